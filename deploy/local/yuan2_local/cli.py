"""Command line of the local cluster."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from . import cluster, images, provisioner, registry, volumes
from .command import note, tail
from .errors import ClusterError
from .gobuild import NODE, TESTS, ensure_binaries
from .node import set_gpus
from .paths import Cache, State, cache_from, control_plane_state, is_foreign, node_state
from .processes import Processes
from .proxies import around_proxy

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns the exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    options = _parser().parse_args(argv)
    try:
        options.run(options, cache_from(os.environ))
    except ClusterError as error:
        note(f"cluster: {error}")
        return 1
    except KeyboardInterrupt:
        note("cluster: interrupted; what this command started is gone again")
        return _INTERRUPTED
    return 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster.py", description="A real one-node Kubernetes on this machine."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, run: Callable[[argparse.Namespace, Cache], None], text: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    for sub in (
        verb("up", _up, "start the cluster, or start again what has died"),
        verb("down", _down, "remove every trace of the cluster but the cache"),
        verb("status", _status, "show the processes and where the kubeconfig is"),
        verb("logs", _logs, "show the log of a component, or list the components"),
    ):
        sub.add_argument("--control-plane-only", action="store_true", help="no node; needs no root")
        sub.add_argument("--name", default="default", help="of the control plane (with --control-plane-only)")
        if sub.prog.endswith("logs"):
            sub.add_argument("component", nargs="?")
            sub.add_argument("--lines", type=int, default=100)
    volume = verb("volume", _volume, "make a volume for a claim before the claim exists")
    volume.add_argument("claim", metavar="NAMESPACE/CLAIM")
    volume.add_argument("--size", default="2Gi")
    volume.add_argument("--tmpfs", action="store_true", help="hold no more than --size, in memory")
    path = verb("volume-path", _volume_path, "print the directory behind a claim")
    path.add_argument("claim", metavar="NAMESPACE/CLAIM")
    gpus = verb("gpus", _gpus, "make the node say that it has N GPUs")
    gpus.add_argument("count", type=int, metavar="N")
    build = verb("images", _images, "build the images and push them to the cluster's registry")
    build.add_argument(
        "names", nargs="*", help=f"of {' '.join(images.NAMES)}; default: {' '.join(images.DEFAULT)}"
    )
    verb("build", _build, "build the programs of a cluster and, as root, the images, ahead of their use")
    verb("registry-down", _registry_down, "stop a registry that `images` started without a cluster")
    verb("provision", _provision, "serve volume claims (started by `up`)")
    return parser


def _state(options: argparse.Namespace, cache: Cache) -> State:
    if options.control_plane_only:
        return control_plane_state(cache, options.name)
    return node_state(os.environ)


def _up(options: argparse.Namespace, cache: Cache) -> None:
    if is_foreign(os.environ) and not options.control_plane_only:
        print(f"KUBECONFIG is set: using the cluster of {os.environ['KUBECONFIG']}, starting none")
        return
    state = _state(options, cache)
    cluster.up(cache, state, with_node=not options.control_plane_only)
    print(exports(cache, state, os.environ))


def exports(cache: Cache, state: State, environ: Mapping[str, str]) -> str:
    """What a person types to reach the cluster from a shell with this environment."""
    words = [
        f"KUBECONFIG={shlex.quote(str(state.kubeconfig))}",
        f"PATH={shlex.quote(str(cache.binaries))}:$PATH",
    ]
    words += [f"{name}={value}" for name, value in around_proxy(environ).items()]
    return f"export {' '.join(words)}"


def _down(options: argparse.Namespace, cache: Cache) -> None:
    cluster.down(cache, _state(options, cache))


def _status(options: argparse.Namespace, cache: Cache) -> None:
    state = _state(options, cache)
    found = cluster.load(state)
    if found is None:
        raise ClusterError("no cluster runs: `cluster.py up` starts one")
    living = Processes(state).running()
    for name, record in Processes(state).records().items():
        print(f"{name:24} {'running' if name in living else 'dead':8} pid {record.pid}")
    print(f"kubeconfig {state.kubeconfig}")


def _logs(options: argparse.Namespace, cache: Cache) -> None:
    state = _state(options, cache)
    if options.component is None:
        print("\n".join(sorted([*Processes(state).records(), registry.NAME])))
        return
    if options.component == registry.NAME:
        state = State(cache.registry_state)
    elif options.component not in Processes(state).records():
        raise ClusterError(
            f"component {options.component!r}: not one of {', '.join(Processes(state).records())}"
        )
    print(tail(Processes(state).log(options.component), options.lines))


def _volume(options: argparse.Namespace, _cache: Cache) -> None:
    plane = cluster.running(node_state(os.environ))
    print(volumes.create_volume(plane.client(), plane.state, options.claim, options.size, options.tmpfs))


def _volume_path(options: argparse.Namespace, _cache: Cache) -> None:
    print(volumes.directory(node_state(os.environ), *volumes.parse_claim(options.claim)))


def _gpus(options: argparse.Namespace, _cache: Cache) -> None:
    if options.count < 0:
        raise ClusterError(f"N {options.count}: write 0 or more")
    set_gpus(cluster.running(node_state(os.environ)).client(), options.count)


def _images(options: argparse.Namespace, cache: Cache) -> None:
    unknown = sorted(set(options.names) - set(images.NAMES))
    if unknown:
        raise ClusterError(f"image {unknown[0]!r}: not one of {', '.join(images.NAMES)}")
    for name, reference in images.build(cache, options.names or images.DEFAULT, os.environ).items():
        print(f"{name} {reference}")


def _build(_options: argparse.Namespace, cache: Cache) -> None:
    ensure_binaries(cache, (*NODE, *TESTS))
    if os.geteuid() != 0:
        return
    running = registry.is_running(cache)
    try:
        images.build(cache, images.DEFAULT, os.environ)
    finally:
        if not running:
            registry.stop_registry(cache)


def _registry_down(_options: argparse.Namespace, cache: Cache) -> None:
    registry.stop_registry(cache)


def _provision(_options: argparse.Namespace, _cache: Cache) -> None:
    state = node_state(os.environ)
    provisioner.serve(cluster.running(state).client("provisioner"), state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
