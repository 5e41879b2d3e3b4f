"""Which locked packages an image installs on its base: `fit.py LOCK [OLDER_LOCK]` prints a requirements file.

The base owns its torch: NVIDIA's is built for the machine and no package of PyPI may replace it, so torch,
its GPU libraries and the numpy it was compiled against are left out wherever the base has them. So is what
is installed at the locked version already, and what is locked for another Python. The rest is printed with
its hashes, for `pip install --no-deps --require-hashes`: the lock is complete, so pip needs to resolve
nothing and can pull nothing else in.

Where the base's torch is older than the newest transformers accepts, the pins of OLDER_LOCK go first.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

try:
    from packaging.markers import Marker
except ImportError:  # a bare base has only pip, which carries it
    from pip._vendor.packaging.markers import Marker

# From this torch on the newest locked transformers and DeepSpeed are used; OLDER_LOCK serves those before.
NEW_TORCH = (2, 6)
_OWNED_BY_BASE = re.compile(r"torch|triton|numpy|nvidia-.*|pytorch-triton.*")
_TEST_TOOLS = re.compile(r"pytest.*|hypothesis|pluggy|iniconfig")
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)\s*(?:;([^\\]+))?")


def canonical(name: str) -> str:
    """A distribution's name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str, python: str = platform.python_version()) -> dict[str, tuple[str, str]]:
    """name -> (version, the lines of its requirement) of a lock file, as far as it is for this Python."""
    found: dict[str, tuple[str, str]] = {}
    current = ""
    for line in lock.splitlines():
        match = _PIN.match(line)
        if match:
            here = not match[3] or Marker(match[3].strip()).evaluate({"python_full_version": python})
            current = canonical(match[1]) if here else ""
            if here:
                found[current] = (match[2], line)
        elif current and line.startswith((" ", "\t")) and "--hash" in line:
            version, text = found[current]
            found[current] = (version, f"{text}\n{line}")
    return found


def fit(locks: Sequence[str], installed: Mapping[str, str]) -> str:
    """The requirements to install, given name -> version of what the base has."""
    wanted = pins(locks[0])
    if len(locks) > 1 and "torch" in installed and _release(installed["torch"]) < NEW_TORCH:
        older = {name: pin for name, pin in pins(locks[1]).items() if not _TEST_TOOLS.fullmatch(name)}
        wanted = {**wanted, **older}
    chosen = []
    for name, (version, text) in sorted(wanted.items()):
        owned = _OWNED_BY_BASE.fullmatch(name) and "torch" in installed
        if not owned and installed.get(name) != version:
            chosen.append(text)
    return "".join(f"{text}\n" for text in chosen)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return tuple(int(part) for part in match.groups()) if match else (0, 0)


def installed_versions() -> dict[str, str]:
    """name -> version of every installed distribution."""
    return {canonical(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}


if __name__ == "__main__":
    print(fit([Path(path).read_text() for path in sys.argv[1:]], installed_versions()), end="")
