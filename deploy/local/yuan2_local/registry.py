"""The image registry on the loopback; its blobs live in the cache, so images survive a cluster."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from .command import exclusive, wait_until
from .gobuild import ensure_binaries
from .paths import Cache, State
from .ports import LOOPBACK, preferred_port
from .processes import Processes

NAME = "registry"
_PREFERRED_PORT = 5056
_READY_SECONDS = 20.0


def config(root: Path, port: int) -> dict[str, object]:
    """The registry's configuration (JSON, which is YAML): files, deletion allowed, no metrics or caches."""
    return {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(root), "maxthreads": 100},
            "delete": {"enabled": True},
            "maintenance": {"uploadpurging": {"enabled": False}},
        },
        "http": {"addr": f"{LOOPBACK}:{port}"},
    }


def ensure_registry(cache: Cache) -> str:
    """Start the registry unless it runs; returns its host:port as image references name it.

    The port is remembered, because it is part of every reference.
    """
    state = State(cache.registry_state)
    with exclusive(cache.locks / "registry.lock"):
        processes = Processes(state)
        port_file = state.root / "port"
        if NAME not in processes.running():
            remembered = int(port_file.read_text()) if port_file.exists() else _PREFERRED_PORT
            port = preferred_port(remembered)
            cache.registry.mkdir(parents=True, exist_ok=True)
            state.root.mkdir(parents=True, exist_ok=True)
            (state.root / "config.yaml").write_text(json.dumps(config(cache.registry, port), indent=2))
            port_file.write_text(str(port))
            binary = ensure_binaries(cache, [NAME])[NAME]
            processes.ensure(
                NAME, [binary, "serve", state.root / "config.yaml"], {"OTEL_TRACES_EXPORTER": "none"}
            )
        port = int(port_file.read_text())
        wait_until(NAME, lambda: _check(processes, port), _READY_SECONDS, interval=0.05)
    return f"localhost:{port}"


def is_running(cache: Cache) -> bool:
    """Whether the registry runs, for whomever."""
    return NAME in Processes(State(cache.registry_state)).running()


def stop_registry(cache: Cache) -> None:
    """Stop the registry; its blobs and its port stay."""
    with exclusive(cache.locks / "registry.lock"):
        Processes(State(cache.registry_state)).stop(NAME)


def has_image(registry: str, repository: str, tag: str) -> bool:
    """Whether the registry holds repository:tag."""
    return answers(f"http://{registry.replace('localhost', LOOPBACK)}/v2/{repository}/manifests/{tag}")


def _check(processes: Processes, port: int) -> bool:
    processes.check([NAME])
    return answers(f"http://{LOOPBACK}:{port}/v2/")


def answers(url: str) -> bool:
    """Whether GET of a loopback URL succeeds now."""
    accept = (
        "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    )
    request = urllib.request.Request(url, headers={"Accept": accept}, method="GET")
    # The loopback is never behind the machine's proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
