"""The operator as its own process, with the rights of its service account."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
QUICK = {
    "YUAN2_TRAIN_IMAGE": "registry.example/yuan2/train:1",
    "YUAN2_SERVE_IMAGE": "registry.example/yuan2/serve:1",
    "YUAN2_POLL_SECONDS": "0.3",
    "YUAN2_MISSING_SECONDS": "0.5",
    "YUAN2_PROGRESS_VIA": "ip",
    "YUAN2_PORT": "0",
}
"""Settings that make tests short."""


def service_account_kubeconfig(cluster: Any, directory: Path) -> Path:
    """Install the operator's RBAC and return a kubeconfig with a token of its service account."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(ROOT / "deploy" / "base"))
    token = cluster.kubectl(
        "create", "token", "yuan2-operator", "-n", "yuan2-system", "--duration=2h"
    ).strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path = directory / "operator.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Operator:
    """Starts, kills and asks one operator."""

    kubeconfig: Path
    log: Path
    settings: Mapping[str, str] = field(default_factory=lambda: QUICK)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its watches are up."""
        environ = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("core", "operator")),
            **self.settings,
        }
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "yuan2_operator"], env=environ, stdout=output, stderr=output
            )
        deadline = time.monotonic() + 30
        while "Initial authentication has finished" not in self.text()[offset:]:
            assert self.process.poll() is None, self.text()[offset:]
            assert time.monotonic() < deadline, self.text()[offset:]
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL: nothing is said goodbye to."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)

    def stop(self) -> int:
        """SIGTERM; gives the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    @contextlib.contextmanager
    def running(self) -> Iterator[Operator]:
        """Runs inside this context."""
        self.start()
        try:
            yield self
        finally:
            self.kill()

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text() if self.log.exists() else ""

    def ask(self, path: str) -> str:
        """The answer of its HTTP server."""
        port = re.findall(r"health and metrics on .*?0\.0\.0\.0:(\d+)", self.text())[-1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return str(response.read().decode())

    def api_requests(self) -> dict[tuple[str, str], int]:
        """Requests to the API server so far, by verb and resource; watches are not counted."""
        text = self.ask("/metrics")
        pattern = re.compile(
            r'^yuan2_operator_api_requests_total\{resource="(\S+?)",verb="(\S+?)"\} (\S+)$', re.MULTILINE
        )
        return {(verb, resource): int(float(count)) for resource, verb, count in pattern.findall(text)}


@contextlib.contextmanager
def instead_of(
    operator: Operator, directory: Path, settings: Mapping[str, str], count: int = 1
) -> Iterator[list[Operator]]:
    """Operators of other settings run instead of this one, which runs again afterwards."""
    operator.kill()
    made = [
        replace(operator, log=directory / f"{number}.log", settings={**QUICK, **settings}, process=None)
        for number in range(count)
    ]
    try:
        with contextlib.ExitStack() as stack:
            for one in made:
                stack.enter_context(one.running())
            yield made
            logs = [one.text() for one in made]
        assert not any("Traceback" in log for log in logs), "\n".join(logs)[-5000:]
    finally:
        operator.start()
