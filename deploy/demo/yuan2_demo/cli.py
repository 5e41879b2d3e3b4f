"""`demo.py up` and `demo.py down`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from . import install, steps
from .errors import DemoError
from .kubectl import Kubectl
from .questions import Score
from .status import Training
from .target import Target, build_images, choose, find_kubectl, start, stop
from .terminal import Terminal

EXIT_INTERRUPTED = 130
_STEPS = 7


def main(argv: Sequence[str]) -> int:
    """Run one verb; 0 when it did what it says, 1 with one sentence on stderr when it did not."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("verb", choices=["up", "down"])
    verb = parser.parse_args(argv).verb
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # answers are Chinese; a C locale must not end the demo
    try:
        target = choose(os.environ)
        return up(target) if verb == "up" else down(target)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        if error.look:
            print(f"look: {error.look}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; nothing is left half done, `make demo` begins again", file=sys.stderr)
        return EXIT_INTERRUPTED


def up(target: Target) -> int:
    """The whole path. Returns 1 when too few answers are verbatim."""
    terminal = Terminal(_STEPS)
    with _terminable():
        terminal.step(
            "cluster: " + ("a one-node Kubernetes on this machine" if target.local else "KUBECONFIG")
        )
        start(target, os.environ)
        terminal.done("ready")
        terminal.step("images: train, serve and operator")
        images = build_images(os.environ)
        terminal.done(images["train"].rpartition("/")[0] or "built")
        kubectl = Kubectl(find_kubectl(target, os.environ), target.kubeconfig)
        with kubectl.reader() as reader:
            session = steps.Session(kubectl, reader, terminal)
            try:
                run, score, url = path(session, images, target)
            except KeyboardInterrupt:
                clean_up(session)
                raise
    summary(terminal, target, kubectl, run, url)
    terminal.line(f"demo: {score.right} of {score.total} trained questions answered verbatim")
    return 0 if score.passed else 1


def path(session: steps.Session, images: Mapping[str, str], target: Target) -> tuple[Training, Score, str]:
    """From the operator to the answers."""
    steps.install_operator(session, images, keep_foreign=not target.local)
    steps.make_base(session, images)
    run = steps.train(session)
    steps.serve(session)
    with steps.reach(session) as base_url:
        return run, steps.interview(session, base_url), base_url


def clean_up(session: steps.Session) -> None:
    """After Ctrl-C: remove the example, keep the cluster for the next time."""
    session.terminal.line("interrupted: removing the example; the cluster stays (make demo-down removes it)")
    with contextlib.suppress(DemoError):
        steps.remove_namespace(session.kubectl, session.reader)


def summary(terminal: Terminal, target: Target, kubectl: Kubectl, run: Training, url: str) -> None:
    """What was reached, and what to type next."""
    if run.loss is not None and run.tokens_per_second:
        terminal.line(
            f"trained to loss {run.loss:.4f} at {run.tokens_per_second:,.0f} tokens/s; look around:"
        )
    folder = Path(kubectl.program).parent
    on_path = str(folder) in os.environ.get("PATH", "").split(os.pathsep)
    path = "" if on_path else f" PATH={below_home(folder)}:$PATH"
    terminal.line(f"  export KUBECONFIG={below_home(target.kubeconfig)}{path}")
    terminal.line(f"  kubectl -n {install.NAMESPACE} get y2ft,y2svc,pods")
    terminal.line(f"  kubectl -n {install.NAMESPACE} describe y2ft {install.NAME}")
    terminal.line(f"  kubectl -n {install.NAMESPACE} logs job/{install.NAME}-1")
    if target.local:
        terminal.line(f"  curl {url}/models")
    else:
        terminal.line(f"  kubectl -n {install.NAMESPACE} port-forward service/{install.NAME}-api 8505")
    terminal.line("  make demo-down   # removes every trace")


def below_home(path: Path) -> str:
    """A path as people type it: with ~ where it lies in their home."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def down(target: Target) -> int:
    """Remove what `up` made: the local cluster, or the demo's objects on a foreign one."""
    if target.local:
        stop(os.environ)
        print("demo: every trace is removed; the cache stays for the next time")
        return 0
    kubectl = Kubectl(find_kubectl(target, os.environ), target.kubeconfig)
    with kubectl.reader() as reader:
        print(f"demo: {steps.uninstall(kubectl, reader)}")
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
