"""A small Debian root file system for base images, made by debootstrap once."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from .apt import ensure_packages
from .command import exclusive, run, step
from .content import content_key
from .errors import ClusterError
from .mounts import unmount_below
from .paths import Cache

SUITE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"
_PACKAGES = ("ca-certificates", "libgomp1", "python3", "python3-venv")
_USELESS_IN_AN_IMAGE = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
)


def rootfs_key() -> str:
    """Key of the root file system."""
    return content_key([], Path(), {"suite": SUITE, "packages": " ".join(_PACKAGES), "layout": "1"})


def ensure_rootfs(cache: Cache) -> Path:
    """The tar file of the root file system, made when it is not in the cache."""
    target = cache.debian / f"{SUITE}-{rootfs_key()}.tar"
    with exclusive(cache.locks / "debian.lock"):
        if not target.exists():
            ensure_packages()
            with step(f"debootstrap {SUITE}"):
                _make(cache.debian / "root", target)
    return target


def mirror_of(targets: str) -> str:
    """The Debian mirror this machine uses, from `apt-get indextargets --format '$(ORIGIN) $(REPO_URI)'`."""
    for line in targets.splitlines():
        origin, _, uri = line.partition(" ")
        if origin == "Debian" and "security" not in uri and uri.startswith("http"):
            return uri.rstrip("/")
    return _MIRROR


def _mirror() -> str:
    try:
        return mirror_of(run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)"]))
    except ClusterError:
        return _MIRROR


def _make(folder: Path, target: Path) -> None:
    _clear(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    try:
        run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", SUITE, folder, _mirror()]
        )
        for name in _USELESS_IN_AN_IMAGE:
            _empty(folder / name)
        unmount_below(folder)
        run(["tar", "--numeric-owner", "--one-file-system", "-C", folder, "-cf", partial, "."])
        partial.replace(target)
    finally:
        _clear(folder)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _clear(folder: Path) -> None:
    # An interrupted debootstrap leaves /proc mounted inside: never remove through a mount.
    unmount_below(folder)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
