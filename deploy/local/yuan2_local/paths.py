"""Where things live: the cache that outlives clusters, and the state of one running cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
LOCAL = REPOSITORY / "deploy" / "local"


@dataclass(frozen=True)
class Cache:
    """What is expensive to make and survives `down`."""

    root: Path

    @property
    def binaries(self) -> Path:
        """Go programs, a folder a content key."""
        return self.root / "bin"

    @property
    def registry(self) -> Path:
        """Blobs of the loopback image registry."""
        return self.root / "registry"

    @property
    def buildah(self) -> Path:
        """Storage of image builds."""
        return self.root / "buildah"

    @property
    def wheels(self) -> Path:
        """Python packages downloaded during image builds."""
        return self.root / "wheels"

    @property
    def uv(self) -> Path:
        """uv's own cache, shared with `make venv`."""
        return self.root / "uv"

    @property
    def debian(self) -> Path:
        """Debian root file systems, a tar file a content key."""
        return self.root / "debian"

    @property
    def containerd(self) -> Path:
        """Unpacked images of the node, so that a new cluster need not unpack them again."""
        return self.root / "containerd"

    @property
    def locks(self) -> Path:
        """Lock files: one `up` or `down` of a cluster at a time, one build of a thing at a time."""
        return self.root / "locks"

    @property
    def images_lock(self) -> Path:
        """Held while an image is built or pushed."""
        return self.locks / "images.lock"

    @property
    def registry_state(self) -> Path:
        """State of the registry, which serves `images` even when no cluster runs."""
        return self.root / "registry-state"


@dataclass(frozen=True)
class State:
    """The folder of one running cluster; `down` removes it."""

    root: Path

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.root / "pki"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.root / "kubeconfig"

    @property
    def processes(self) -> Path:
        """Records of started processes."""
        return self.root / "processes"

    @property
    def logs(self) -> Path:
        """One log a process."""
        return self.root / "logs"

    @property
    def config(self) -> Path:
        """Rendered configuration files."""
        return self.root / "config"

    @property
    def etcd(self) -> Path:
        """The database."""
        return self.root / "etcd"

    @property
    def kubelet(self) -> Path:
        """The kubelet's root directory."""
        return self.root / "kubelet"

    @property
    def run(self) -> Path:
        """Sockets and runtime state of containerd."""
        return self.root / "run"

    @property
    def containerd_socket(self) -> Path:
        """The socket of this cluster's own containerd."""
        return self.run / "containerd.sock"

    @property
    def volumes(self) -> Path:
        """Directories behind persistent volumes: NAMESPACE/CLAIM."""
        return self.root / "volumes"

    @property
    def cluster_file(self) -> Path:
        """What was chosen when the cluster was made: flavour, ports, host settings to restore."""
        return self.root / "cluster.json"


def cache_from(environ: Mapping[str, str]) -> Cache:
    """`YUAN2_CACHE`, else `XDG_CACHE_HOME/yuan2`, else `~/.cache/yuan2`."""
    if environ.get("YUAN2_CACHE"):
        return Cache(Path(environ["YUAN2_CACHE"]).absolute())
    base = environ.get("XDG_CACHE_HOME")
    return Cache((Path(base).absolute() if base else Path("~/.cache").expanduser()) / "yuan2")


def node_state(environ: Mapping[str, str]) -> State:
    """State of the full one-node cluster: `YUAN2_STATE`, else `/var/lib/yuan2`."""
    return State(Path(environ.get("YUAN2_STATE") or "/var/lib/yuan2").absolute())


def control_plane_state(cache: Cache, name: str) -> State:
    """State of the control plane called `name`, which needs no root."""
    return State(cache.root / "control-planes" / name)


def is_foreign(environ: Mapping[str, str]) -> bool:
    """Whether `KUBECONFIG` names another cluster than the local one, which is then to be used instead."""
    named = environ.get("KUBECONFIG", "")
    return bool(named) and named != str(node_state(environ).kubeconfig)
