"""Debian packages the node needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from .command import run, step
from .errors import ClusterError

# A file or command that a package brings, and the package.
NEEDED: Mapping[str, str] = {
    "/usr/bin/containerd": "containerd",
    "/usr/sbin/runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/bin/buildah": "buildah",
    "/usr/sbin/debootstrap": "debootstrap",
    "/usr/sbin/nft": "nftables",
    "/usr/sbin/iptables": "iptables",
    "/usr/sbin/conntrack": "conntrack",
    "/usr/bin/openssl": "openssl",
    "/usr/bin/mount": "mount",
    "/sbin/ip": "iproute2",
    "/etc/ssl/certs/ca-certificates.crt": "ca-certificates",
}


def missing_packages(exists: Mapping[str, bool]) -> list[str]:
    """Packages whose file is not there; `exists` tells for every path of NEEDED."""
    return sorted({package for path, package in NEEDED.items() if not exists[path]})


def ensure_packages() -> None:
    """Install what is missing. ClusterError where that needs apt-get or root and there is none."""
    absent = missing_packages({path: _there(path) for path in NEEDED})
    if not absent:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(
            f"missing {', '.join(absent)} and no apt-get: install them with this system's packages"
        )
    if os.geteuid() != 0:
        raise ClusterError(f"missing packages {', '.join(absent)}: run as root, or apt-get install them")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step(f"install {' '.join(absent)}"):
        run(["apt-get", "update", "-qq"], environ=environ)
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *absent], environ=environ)


def _there(path: str) -> bool:
    return Path(path).exists() or shutil.which(Path(path).name) is not None
