"""What goes through the machine's proxy, and what must not: a cluster on this machine is behind none."""

from __future__ import annotations

from collections.abc import Mapping

from .network import NODE_ADDRESS, POD_SUBNET, SERVICE_SUBNET

# Names and addresses for what compares them as text, networks for what understands them.
_OURS = ("localhost", "127.0.0.1", "::1", "127.0.0.0/8", NODE_ADDRESS, POD_SUBNET, SERVICE_SUBNET)
# Programs differ in which of the two they prefer, so both say the same.
_EXCEPTIONS = ("NO_PROXY", "no_proxy")


def without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the cluster's own programs: all they talk to is on this machine."""
    return {name: value for name, value in environ.items() if not name.lower().endswith("_proxy")}


def around_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to add so that clients ask this machine's cluster directly; none without a proxy."""
    named = {name.lower() for name, value in environ.items() if value and name.lower().endswith("_proxy")}
    if named <= {"no_proxy"}:
        return {}
    already = [part.strip() for name in _EXCEPTIONS for part in environ.get(name, "").split(",")]
    listed = ",".join(dict.fromkeys([*filter(None, already), *_OURS]))
    return dict.fromkeys(_EXCEPTIONS, listed)
