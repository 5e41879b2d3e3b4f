"""SIGTERM while a pod's program still starts, as the first process of a container: it ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.pod_processes import children
from tests.support.ports import free_port
from tests.support.serving import Program
from tests.support.waiting import wait_for
from yuan2_operator.manifests.service import FASTCHAT_PROGRAM

END_SECONDS = 20.0
"""For a busy machine; the shortest grace period that this saves is longer."""
PROGRAMS = {
    "worker": (["-m", "yuan2_server", "worker"], "pydantic", 0),
    "api": (["-m", "yuan2_server", "api"], "pydantic", 0),
    "web": (["-m", "yuan2_server", "web"], "pydantic", 0),
    "controller": ([*FASTCHAT_PROGRAM[1:], "fastchat.serve.controller"], "fastchat", 0),
    "page": ([*FASTCHAT_PROGRAM[1:], "fastchat.serve.gradio_web_server"], "fastchat", 0),
    "operator": (["-m", "yuan2_operator"], "kopf", 0),
    "trainer": (["-m", "yuan2_trainer"], "pydantic", 75),
}
"""A pod's command line, a package that it imports, and the exit code that SIGTERM gives it (docs)."""
SLOW_IMPORT = """
import builtins, pathlib, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            pathlib.Path({reached!r}).touch()
            time.sleep(600)
sys.meta_path.insert(0, Slow())
"""


@contextmanager
def first_process(arguments: list[str], extra_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Python with these arguments as PID 1 of a namespace: the process that ends with its exit code, and its
    process id outside."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    inside = ["unshare", *as_root, "--pid", "--fork", "--kill-child"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no PID namespace to this user; run as root")
    path = os.pathsep.join([str(extra_path), *(folder for folder in sys.path if folder)])
    environment = {**os.environ, "PYTHONPATH": path, "LOGDIR": str(extra_path)}
    process = subprocess.Popen([*inside, sys.executable, *arguments], env=environment)
    try:
        [pid] = wait_for("the program", lambda: children(process.pid), 60)
        yield process, pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_still_imports_ends_at_once(program: str, tmp_path: Path) -> None:
    arguments, package, code = PROGRAMS[program]
    reached = tmp_path / "reached"
    hook = SLOW_IMPORT.format(package=package, reached=str(reached))
    (tmp_path / "sitecustomize.py").write_text(hook)
    with first_process(arguments, tmp_path) as (process, pid):
        wait_for("its imports", reached.exists, 60)
        os.kill(pid, signal.SIGTERM)
        assert process.wait(END_SECONDS) == code


def test_fastchats_controller_answers_and_then_ends_too(tmp_path: Path) -> None:
    port = free_port()
    options = ["fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(port)]
    with first_process([*FASTCHAT_PROGRAM[1:], *options], tmp_path) as (process, pid):
        controller = Program(process, f"http://127.0.0.1:{port}", tmp_path / "none")
        controller.log.touch()
        controller.ready("/test_connection")
        os.kill(pid, signal.SIGTERM)
        assert process.wait(END_SECONDS) == 0
