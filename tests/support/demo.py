"""`make demo` from outside: started as a shell starts it, interrupted, and what it leaves on the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from yuan2_local import cluster
from yuan2_local.cleanup import observe_host
from yuan2_local.errors import ClusterError
from yuan2_local.gobuild import go_command
from yuan2_local.paths import REPOSITORY, cache_from, node_state
from yuan2_local.proxies import around_proxy

CACHE, STATE = cache_from(os.environ), node_state(os.environ)
STEPS = 7
INTERRUPTED = 130
STEP_SECONDS = 900.0
END_SECONDS = 300.0
_PROGRAM = REPOSITORY / "deploy" / "demo" / "demo.py"
_RULES = (["nft", "list", "ruleset"], ["iptables-save", "-t", "nat"], ["iptables-save", "-t", "filter"])
_COUNTERS = re.compile(r"\[\d+:\d+\]|packets \d+ bytes \d+")


@dataclass
class Demo:
    """One `demo.py up` or `down` in a process group of its own."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def until(self, mark: str) -> None:
        """Read on to the first line with these words. Raises AssertionError when it ends without."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if mark in line:
                return
        raise AssertionError(f"ended without {mark!r}:\n{self.text}")

    def interrupt(self) -> int:
        """Ctrl-C: the terminal sends SIGINT to the whole group. Gives the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()

    def end(self, seconds: float = END_SECONDS) -> int:
        """Wait for its end; gives the exit code."""
        self.said.append(self.process.communicate(timeout=seconds)[0])
        return self.process.returncode

    @property
    def text(self) -> str:
        """All that it has said."""
        return "".join(self.said)


def demo(verb: str = "up", **environment: str) -> Demo:
    """Start it on the local cluster, or on the one that KUBECONFIG and REGISTRY name."""
    plain = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG", "REGISTRY")}
    process = subprocess.Popen(
        # A shell that runs this in the background has had SIGINT ignored, which children inherit.
        ["env", "--default-signal=INT", sys.executable, str(_PROGRAM), verb],
        text=True,
        start_new_session=True,
        env={**plain, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return Demo(process)


@contextmanager
def empty_machine() -> Iterator[dict[str, Any]]:
    """What the machine was before; whatever happens, no cluster is left on it."""
    try:
        go_command()
    except ClusterError as error:
        pytest.skip(str(error))
    if os.geteuid() != 0:
        pytest.skip("the one-node cluster needs root")
    assert cluster.load(STATE) is None, "a cluster runs already; `make demo-down` first"
    before = machine()
    try:
        yield before
    finally:
        cluster.down(CACHE, STATE)


def interrupt_in(step: int) -> None:
    """Ctrl-C half a second into a step: one sentence, and the example is on its way out."""
    run = demo()
    run.until(f"[{step}/{STEPS}]")
    time.sleep(0.5)
    assert run.interrupt() == INTERRUPTED, run.text
    assert "demo: interrupted; nothing is left half done" in run.text
    assert "Traceback" not in run.text
    assert cluster.load(STATE) is None or not example_is_there()


def succeed(**environment: str) -> str:
    """Run it to its end; gives what it said."""
    run = demo(**environment)
    assert run.end(STEP_SECONDS) == 0, run.text
    assert "trained questions answered verbatim" in run.text
    return run.text


def take_down(**environment: str) -> None:
    """`make demo-down`."""
    run = demo("down", **environment)
    assert run.end() == 0, run.text


def kubectl(*words: str) -> str:
    """As the local cluster's administrator."""
    environment = {**os.environ, **around_proxy(os.environ), "KUBECONFIG": str(STATE.kubeconfig)}
    command = [str(CACHE.binaries / "kubectl"), *words]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def example_is_there() -> bool:
    """Whether the demo's namespace exists and is not being removed."""
    found = json.loads(kubectl("get", "namespaces", "-o", "json"))["items"]
    phases = {item["metadata"]["name"]: item["status"]["phase"] for item in found}
    return phases.get("yuan2-demo", "Terminating") == "Active"


def machine() -> dict[str, Any]:
    """What a cluster changes on a machine: mounts, network rules, links, processes, folders, settings."""
    return {
        "mounts": sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        "rules": sorted(_network_rules()),
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "processes": sorted(_processes()),
        "state": sorted(map(str, STATE.root.rglob("*"))) if STATE.root.exists() else None,
        "cgroups": sorted(map(str, Path("/sys/fs/cgroup").glob("**/kubepods*"))),
        "host": observe_host(),
    }


def _network_rules() -> Iterator[str]:
    """Rules of nftables and iptables, without counters."""
    for command in _RULES:
        if shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True).stdout
            lines = (_COUNTERS.sub("", line).strip() for line in said.splitlines())
            yield from (line for line in lines if line and not line.startswith("#"))


def _processes() -> Iterator[str]:
    """Command lines of the node's programs and of pods."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            pod = "kubepods" in (entry / "cgroup").read_text()
        except OSError:
            continue
        if entry.name.isdigit() and entry.name != str(os.getpid()) and (pod or str(STATE.root) in words):
            yield words
