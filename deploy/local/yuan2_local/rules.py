"""Removing the network rules of our pods: kube-proxy's nftables tables and the CNI plugins' NAT chains.

The CNI plugins write the name of their network into the comment of each rule they make for a pod; that is how
ours are told from those of another container runtime on the same machine.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection

from .command import run

CNI_NETWORK = "yuan2"
_OURS = re.compile(rf'--comment "(?:dnat )?name: \\"{CNI_NETWORK}\\" id: .* -j (CNI-\S+)')
_SHARED_CHAINS = ("CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK")
_KUBE_PROXY_TABLES = ("ip kube-proxy", "ip6 kube-proxy")
# Tables that iptables creates at its first use.
_IPTABLES_TABLES = ("ip nat", "ip filter", "ip mangle", "ip6 nat", "ip6 filter", "ip6 mangle")


def removal_script(saved: str) -> str:
    """iptables-restore input that removes what the CNI plugins made for our pods; empty if nothing.

    `saved` is the output of `iptables-save -t nat`. The chains that all users of host ports share go with the
    last of them; the portmap plugin makes them again when it needs them.
    """
    rules = [line for line in saved.splitlines() if line.startswith("-A ")]
    ours = {match[1] for rule in rules if (match := _OURS.search(rule))}
    chains = set(re.findall(r"^:(CNI-\S+)", saved, re.MULTILINE))
    if not any(chain.startswith("CNI-DN-") for chain in chains - ours):
        ours |= chains & set(_SHARED_CHAINS)
    if not ours:
        return ""
    jumps = [rule for rule in rules if rule.split()[-1] in ours and rule.split()[1] not in ours]
    lines = [f"-D {rule.removeprefix('-A ')}" for rule in jumps]
    lines += [f"-F {chain}" for chain in sorted(ours)]
    lines += [f"-X {chain}" for chain in sorted(ours)]
    return "\n".join(["*nat", *lines, "COMMIT", ""])


def is_empty_table(listing: str) -> bool:
    """Whether `nft list table` shows only chains without rules."""
    frame = re.compile(r"#.*|table .*\{|chain .*\{|type .* hook .*|\}|")
    return all(frame.fullmatch(line.strip()) for line in listing.splitlines())


def nft_tables() -> list[str]:
    """Tables as "family name"."""
    if shutil.which("nft") is None:
        return []
    return [line.removeprefix("table ") for line in run(["nft", "list", "tables"]).splitlines()]


def reaches_api(address: str) -> bool:
    """Whether kube-proxy has written its rules, by that for the API server's Service.

    Before it has, what pods send there leaves the machine by its default route, and whoever is out there
    answers.
    """
    if "ip kube-proxy" not in nft_tables():
        return False
    return f"{address} . tcp" in run(["nft", "list", "map", "ip", "kube-proxy", "service-ips"])


def remove_rules(tables_before: Collection[str]) -> None:
    """Remove our rules, and the empty tables that iptables made for them and that were not there before."""
    if shutil.which("iptables-save") and shutil.which("nft"):
        script = removal_script(run(["iptables-save", "-t", "nat"]))
        if script:
            run(["iptables-restore", "--noflush"], stdin=script)
    for table in nft_tables():
        new = table in _IPTABLES_TABLES and table not in tables_before
        if table in _KUBE_PROXY_TABLES or (
            new and is_empty_table(run(["nft", "list", "table", *table.split()]))
        ):
            run(["nft", "delete", "table", *table.split()])
