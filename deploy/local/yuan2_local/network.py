"""The node's network on the host: the bridge of the pods, and forwarding."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from .command import run
from .errors import ClusterError

BRIDGE = "cni0"
NODE_ADDRESS = "10.244.0.1"
POD_SUBNET = "10.244.0.0/16"
SERVICE_SUBNET = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
"""Where pods find the API server: the first address of the subnet."""
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def overlapping_routes(routes: list[dict[str, str]], subnets: tuple[str, ...]) -> list[str]:
    """Routes of `ip -j route` on other interfaces, but the default one, that overlap our subnets."""
    ours = [ipaddress.ip_network(subnet) for subnet in subnets]
    found = []
    for route in routes:
        if route["dst"] == "default" or route.get("dev") == BRIDGE:
            continue
        network = ipaddress.ip_network(route["dst"], strict=False)
        if any(network.overlaps(own) for own in ours):
            found.append(f"{route['dst']} dev {route.get('dev', '?')}")
    return found


def ensure_bridge() -> None:
    """Create the bridge and switch forwarding on.

    Raises ClusterError when another route uses the cluster's addresses.
    """
    routes = json.loads(run(["ip", "-4", "-j", "route"]) or "[]")
    clash = overlapping_routes(routes, (POD_SUBNET, SERVICE_SUBNET))
    if clash:
        raise ClusterError(f"route {clash[0]}: overlaps {POD_SUBNET} or {SERVICE_SUBNET}; end what made it")
    if not bridge_exists():
        run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    prefix = ipaddress.ip_network(POD_SUBNET).prefixlen
    if NODE_ADDRESS not in run(["ip", "-4", "addr", "show", "dev", BRIDGE]):
        run(["ip", "addr", "add", f"{NODE_ADDRESS}/{prefix}", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])
    FORWARDING.write_text("1")


def bridge_exists() -> bool:
    """Whether the bridge is there."""
    return Path(f"/sys/class/net/{BRIDGE}").exists()


def remove_bridge() -> None:
    """Remove the bridge if it is there."""
    if bridge_exists():
        run(["ip", "link", "delete", BRIDGE])
