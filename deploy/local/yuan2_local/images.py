"""Building the images with buildah and pushing them where the cluster pulls from.

An image's tag is the key of what went into it, so an unchanged tree builds and pushes nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .apt import ensure_packages
from .command import exclusive, run, step
from .content import content_key
from .debian import ensure_rootfs, rootfs_key
from .errors import ClusterError
from .mounts import unmount_below
from .paths import REPOSITORY, Cache, is_foreign
from .prune import prune_registry
from .registry import ensure_registry, has_image

DEFAULT = ("train", "serve", "operator")
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_CA_IN_BUILD = "/etc/ssl/host-ca.crt"
# uv and pip name a package mirror differently. Whichever is set serves both; uv's newest name goes first.
_INDEXES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")


@dataclass(frozen=True)
class Image:
    """How one image is made. Paths are relative to the repository.

    `base` is the image passed as the build argument `base_argument`, or "" for none. With `whole_tree` the
    build context is the repository; else a folder with copies of `inputs` (and the Debian root file system).
    """

    name: str
    dockerfile: str
    inputs: tuple[str, ...]
    base: str = ""
    base_argument: str = "BASE_IMAGE"
    whole_tree: bool = True


def _program(name: str, folders: tuple[str, ...], locks: tuple[str, ...], base: str) -> Image:
    requirements = tuple(f"requirements/{lock}.txt" for lock in locks)
    return Image(name, f"Dockerfile.{name}", ("deploy/images/fit.py", *requirements, *folders), base)


IMAGES: dict[str, Image] = {
    image.name: image
    for image in (
        Image("python", "deploy/local/base/Dockerfile.python", (), whole_tree=False),
        Image(
            "base",
            "deploy/local/base/Dockerfile.cpu",
            (
                "requirements/train.txt",
                "requirements/serve.txt",
                "deploy/local/base/prune.py",
                "deploy/local/base/gpu_code.py",
            ),
            "python",
            "PYTHON_IMAGE",
            whole_tree=False,
        ),
        _program("train", ("core", "trainer_image"), ("train", "compat"), "base"),
        _program("serve", ("core", "server_image"), ("serve", "compat", "vllm"), "base"),
        _program("operator", ("core/yuan2_core", "operator"), ("operator",), "python"),
    )
}
NAMES = tuple(IMAGES)


def image_tag(name: str, base_image: str = "", root: Path = REPOSITORY) -> str:
    """Content key of an image: its Dockerfile, what it copies, its base (`base_image` if named)."""
    image = IMAGES[name]
    facts = {"name": name}
    if image.base:
        outside = base_image and image.base == "base"
        facts["base"] = base_image if outside else image_tag(image.base, base_image, root)
    else:
        facts["rootfs"] = rootfs_key()
    return content_key([root / path for path in (image.dockerfile, *image.inputs)], root, facts)


def build(cache: Cache, names: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Make sure that the named images are in the registry; returns name -> reference a node can pull.

    `REGISTRY` names another registry than the loopback one, `BASE_IMAGE` another base of train and serve.
    Raises ClusterError when a build or a push fails, or when an outside cluster is used without REGISTRY.
    """
    builder = Builder(cache, environ)
    references = {name: builder.ensure_pushed(name) for name in names}
    builder.prune()
    return references


def plain_http_flags(registry: str) -> list[str]:
    """What lets a push speak plain HTTP to a registry on this machine (of kind or k3d), as Docker does."""
    host = urlsplit(f"//{registry}").hostname or ""
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    return ["--tls-verify=false"] if loopback else []


def package_arguments(environ: Mapping[str, str]) -> dict[str, str]:
    """The build arguments that say where packages come from. A proxy is passed on by buildah itself."""
    passed = {name: environ[name] for name in ("UV_NATIVE_TLS",) if name in environ}
    mirror = next((environ[name] for name in _INDEXES if environ.get(name)), None)
    return passed if mirror is None else {**passed, "PIP_INDEX_URL": mirror, "UV_INDEX_URL": mirror}


class Builder:
    """One run of image builds."""

    def __init__(self, cache: Cache, environ: Mapping[str, str]) -> None:
        self._cache = cache
        self._environ = environ
        self._base_image = environ.get("BASE_IMAGE", "")
        # Taken once: a tree that changes during a build changes the next build's tags.
        self._tags = {name: image_tag(name, self._base_image) for name in IMAGES}
        self._outside = environ.get("REGISTRY", "").rstrip("/")
        if not self._outside and is_foreign(environ):
            raise ClusterError(
                "KUBECONFIG is set but REGISTRY is not: set REGISTRY to a registry that the cluster pulls "
                "from, or unset KUBECONFIG to use a local cluster"
            )
        self._registry = self._outside or ensure_registry(cache)
        self._replaced_base = False

    def ensure_pushed(self, name: str) -> str:
        """The reference of an image that is in the registry now."""
        tag = self._tags[name]
        reference = f"{self._registry}/yuan2/{name}:{tag}"
        if not self._outside and has_image(self._registry, f"yuan2/{name}", tag):
            return reference
        with exclusive(self._cache.images_lock):
            ensure_packages()
            local = self._ensure_built(name)
            if not self._outside:
                # A `down` may have ended it during a long build.
                ensure_registry(self._cache)
            with step(f"push {name}"):
                self._buildah("push", "-q", *self._push_flags(), local, f"docker://{reference}")
        return reference

    def prune(self) -> None:
        """After a new base, remove what was built on the old one from the loopback registry."""
        if self._replaced_base and not self._outside:
            with exclusive(self._cache.images_lock):
                prune_registry(self._cache, {f"yuan2/{name}:{tag}" for name, tag in self._tags.items()})

    def _push_flags(self) -> list[str]:
        # An outside registry gets what every container runtime reads; our own gets what is fastest.
        compression = ["gzip"] if self._outside else ["zstd", "--compression-level", "1"]
        return ["--compression-format", *compression, *plain_http_flags(self._registry)]

    def _ensure_built(self, name: str) -> str:
        local = f"localhost/yuan2/{name}:{self._tags[name]}"
        if self._has(local):
            return local
        image = IMAGES[name]
        arguments = self._download_arguments()
        if image.base:
            named = self._base_image if image.base == "base" else ""
            base = named or self._ensure_built(image.base)
            arguments += ["--build-arg", f"{image.base_argument}={base}"]
        else:
            ensure_rootfs(self._cache)
        self._buildah("rm", "--all")
        with step(f"build {name}"):
            self._bud(image, local, arguments)
        self._forget_older(name, local)
        return local

    def _bud(self, image: Image, local: str, arguments: list[str]) -> None:
        log = self._cache.buildah / f"{image.name}.log"
        log.unlink(missing_ok=True)
        # Intermediate layers of the bases would double gigabytes; ours spare installing packages again.
        argv = ["--isolation=chroot", "--pull=false", f"--layers={str(image.whole_tree).lower()}", *arguments]
        with tempfile.TemporaryDirectory(dir=self._scratch()) as folder:
            context = REPOSITORY if image.whole_tree else self._context(image, Path(folder))
            dockerfile = str(REPOSITORY / image.dockerfile)
            self._buildah("bud", *argv, "-t", local, "-f", dockerfile, str(context), log=log)

    def _context(self, image: Image, folder: Path) -> Path:
        for path in image.inputs:
            shutil.copy2(REPOSITORY / path, folder)
        if not image.base:
            os.link(ensure_rootfs(self._cache), folder / "rootfs.tar")
        return folder

    def _scratch(self) -> Path:
        path = self._cache.buildah / "contexts"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _download_arguments(self) -> list[str]:
        """The build's package caches and, where the machine has its own authority, its certificate bundle."""
        arguments = package_arguments(self._environ)
        mounts = []
        bundle = self._environ.get("PIP_CERT") or self._environ.get("SSL_CERT_FILE") or _CA_BUNDLE
        if Path(bundle).exists():
            mounts.append(f"{bundle}:{_CA_IN_BUILD}:ro")
            arguments |= {"PIP_CERT": _CA_IN_BUILD, "SSL_CERT_FILE": _CA_IN_BUILD}
        for variable, path in (("PIP_CACHE_DIR", self._cache.wheels), ("UV_CACHE_DIR", self._cache.uv)):
            path.mkdir(parents=True, exist_ok=True)
            mounts.append(f"{path}:/cache/{path.name}:rw")
            arguments[variable] = f"/cache/{path.name}"
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        return words + [word for mount in mounts for word in ("-v", mount)]

    def _has(self, local: str) -> bool:
        return local in self._buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()

    def _forget_older(self, name: str, newest: str) -> None:
        listed = self._buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()
        older = [
            image for image in listed if image.startswith(f"localhost/yuan2/{name}:") and image != newest
        ]
        if older:
            self._buildah("rmi", *older)
            self._replaced_base |= name in ("python", "base")

    def _buildah(self, verb: str, *words: str, log: Path | None = None) -> str:
        store = self._cache.buildah
        policy = store / "policy.json"
        if not policy.exists():
            store.mkdir(parents=True, exist_ok=True)
            policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        options = [f"--root={store / 'storage'}", f"--runroot={store / 'run'}", "--storage-driver=overlay"]
        signed = [f"--signature-policy={policy}"] if verb in ("bud", "push") else []
        try:
            return run(["buildah", *options, verb, *signed, *words], environ=self._environ, log=log)
        finally:
            unmount_below(store)
