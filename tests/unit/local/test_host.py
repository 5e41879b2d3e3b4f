"""What `down` decides to remove from the host, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

from yuan2_local.mounts import mounts_below
from yuan2_local.network import overlapping_routes
from yuan2_local.rules import is_empty_table, removal_script

# ruff: noqa: E501  (rules as iptables-save prints them)

OURS = r"""*nat
:POSTROUTING ACCEPT [0:0]
:CNI-DN-aaaa - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-aaaa - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -s 10.244.0.4/32 -m comment --comment "name: \"yuan2\" id: \"71\"" -j CNI-aaaa
-A CNI-aaaa -d 10.244.0.0/16 -m comment --comment "name: \"yuan2\" id: \"71\"" -j ACCEPT
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"yuan2\" id: \"71\"" -m multiport --dports 80 -j CNI-DN-aaaa
COMMIT
"""
THEIRS = r"""*nat
:CNI-DN-bbbb - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-bbbb - [0:0]
-A POSTROUTING -s 10.88.0.4/32 -m comment --comment "name: \"podman\" id: \"72\"" -j CNI-bbbb
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"podman\" id: \"72\"" -m multiport --dports 81 -j CNI-DN-bbbb
COMMIT
"""


def test_all_chains_of_our_network_go_with_the_shared_ones_of_host_ports() -> None:
    script = removal_script(OURS).splitlines()
    assert script[0] == "*nat"
    assert script[-1] == "COMMIT"
    flushed = [line for line in script if line.startswith("-X ")]
    assert flushed == ["-X CNI-DN-aaaa", "-X CNI-HOSTPORT-DNAT", "-X CNI-HOSTPORT-MASQ", "-X CNI-aaaa"]
    assert "-D PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT" in script


def test_chains_of_another_network_stay_and_so_do_the_shared_ones() -> None:
    script = removal_script(OURS.replace("COMMIT\n", "") + THEIRS)
    assert "bbbb" not in script
    assert "CNI-HOSTPORT-MASQ" not in script
    assert "-X CNI-HOSTPORT-DNAT" not in script
    assert "-X CNI-aaaa" in script


def test_nothing_of_ours_needs_no_script() -> None:
    assert removal_script(THEIRS) == ""
    assert removal_script("*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n") == ""


def test_a_table_with_a_rule_is_not_empty() -> None:
    hook = "type nat hook postrouting priority srcnat; policy accept;"
    empty = f"table ip nat {{\n\tchain POSTROUTING {{\n\t\t{hook}\n\t}}\n}}\n"
    assert is_empty_table(empty)
    assert not is_empty_table(
        empty.replace("policy accept;\n", "policy accept;\n\t\tip daddr 10.0.0.1 accept\n")
    )


def test_mounts_are_unmounted_deepest_first_and_only_below_our_roots() -> None:
    mountinfo = "\n".join(
        f"1 2 0:1 / {point} rw shared:1 - tmpfs tmpfs rw"
        for point in ("/", "/s/kubelet", r"/s/kubelet/pods/a\040b", "/state", "/s/kubelet/pods")
    )
    assert mounts_below(mountinfo, [Path("/s")]) == ["/s/kubelet/pods/a b", "/s/kubelet/pods", "/s/kubelet"]


def test_a_route_into_our_subnets_is_found_and_our_own_bridge_is_not() -> None:
    routes = [
        {"dst": "default", "dev": "eth0"},
        {"dst": "10.244.0.0/16", "dev": "cni0"},
        {"dst": "192.0.2.0/24", "dev": "eth0"},
        {"dst": "10.0.0.0/8", "dev": "tun0"},
    ]
    assert overlapping_routes(routes, ("10.244.0.0/16",)) == ["10.0.0.0/8 dev tun0"]
    assert overlapping_routes(routes[:3], ("10.244.0.0/16",)) == []
