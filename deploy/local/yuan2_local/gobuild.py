"""Building the cluster's Go programs into the cache."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .command import exclusive, run, step
from .content import content_key
from .errors import ClusterError
from .paths import LOCAL, Cache

OLDEST_GO = (1, 24)
KUBERNETES_VERSION = "v1.34.4"
_VERSION_PACKAGE = "k8s.io/component-base/version"
_MAJOR, _MINOR = KUBERNETES_VERSION.lstrip("v").split(".")[:2]
_KUBERNETES_FLAGS = (
    f"-X {_VERSION_PACKAGE}.gitVersion={KUBERNETES_VERSION} -X {_VERSION_PACKAGE}.gitTreeState=clean"
    f" -X {_VERSION_PACKAGE}.gitMajor={_MAJOR} -X {_VERSION_PACKAGE}.gitMinor={_MINOR}"
)


@dataclass(frozen=True)
class Patch:
    """A published main.go of which one text is built as another one."""

    file: str
    """Path in the published module."""
    old: str
    new: str


@dataclass(frozen=True)
class Program:
    """A Go program: the module folder under deploy/local/go, the package in it, extra linker flags."""

    name: str
    module: str
    package: str
    link_flags: str = ""
    source: str = ""
    """The published module that the program is from, where it has a patch or manifests."""
    patch: Patch | None = None
    manifests: str = ""
    """Folder of that module which is kept beside the binary."""


def _kubernetes(name: str) -> Program:
    return Program(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", _KUBERNETES_FLAGS)


PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        Program("etcd", "kubernetes", "./etcd"),
        _kubernetes("kube-apiserver"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kubectl"),
        _kubernetes("kube-scheduler"),
        _kubernetes("kubelet"),
        _kubernetes("kube-proxy"),
        Program("crisweep", "kubernetes", "./crisweep"),
        Program("coredns", "coredns", "."),
        Program("registry", "registry", "."),
        Program("pause", "pause", "."),
        Program(
            "kueue",
            "kueue",
            "sigs.k8s.io/kueue/cmd/kueue",
            source="sigs.k8s.io/kueue",
            # The certificates of its metrics have a fixed place, which only root could fill.
            patch=Patch(
                "cmd/kueue/main.go", '"/etc/kueue/metrics/certs"', 'os.Getenv("KUEUE_METRICS_CERTS")'
            ),
            manifests="config",
        ),
        Program(
            "kwok", "kwok", "sigs.k8s.io/kwok/cmd/kwok", source="sigs.k8s.io/kwok", manifests="kustomize"
        ),
    )
}
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
NODE = (*CONTROL_PLANE, "kube-scheduler", "kubelet", "kube-proxy", "crisweep", "coredns", "registry", "pause")


TESTS = ("kueue", "kwok")
"""What only tests and benchmarks use."""


def program_key(program: Program, modules: Path) -> str:
    """Key of a program's binary: the module's versions and hashes, its own sources, the flags."""
    folder = modules / program.module
    inputs = [folder / "go.mod"]
    if (folder / "go.sum").exists():
        inputs.append(folder / "go.sum")
    if program.package.startswith("."):
        inputs += sorted((folder / program.package).glob("*.go"))
    facts = {"package": program.package, "flags": program.link_flags}
    if program.source:
        facts |= {"patch": repr(program.patch), "manifests": program.manifests}
    return content_key(inputs, folder, facts)


def binary_path(cache: Cache, program: Program, modules: Path = LOCAL / "go") -> Path:
    """Where the program's binary is or will be."""
    return cache.binaries / f"{program.name}-{program_key(program, modules)}" / program.name


def ensure_binaries(cache: Cache, names: Iterable[str]) -> dict[str, Path]:
    """Build what is missing, one program at a time, and return every path.

    Raises ClusterError when Go is needed but absent, or when a build fails.
    """
    paths = {name: binary_path(cache, PROGRAMS[name]) for name in names}
    for name, path in paths.items():
        if path.exists():
            continue
        with exclusive(cache.locks / "gobuild.lock"):
            if not path.exists():
                _build(PROGRAMS[name], path)
    return paths


def go_command() -> str:
    """The Go tool; ClusterError when there is none or it is too old."""
    found = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    needed = ".".join(map(str, OLDEST_GO))
    if found is None:
        raise ClusterError(
            f"go: not found; install Go {needed} or newer (https://go.dev/dl) and put it on PATH"
        )
    version = run([found, "env", "GOVERSION"]).strip()
    if not new_enough(version):
        raise ClusterError(f"{found}: {version} is too old; install Go {needed} or newer (https://go.dev/dl)")
    return found


def new_enough(version: str) -> bool:
    """Whether a GOVERSION such as "go1.24.3" can build the modules; development builds have no number."""
    match = re.match(r"go(\d+)\.(\d+)", version)
    return match is None or (int(match[1]), int(match[2])) >= OLDEST_GO


def _build(program: Program, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{program.name}.partial")
    environ = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    argv = [go_command(), "build", "-trimpath", "-buildvcs=false", "-p", str(min(2, os.cpu_count() or 1))]
    argv += ["-ldflags", f"-s -w {program.link_flags}".strip(), "-o", str(partial)]
    folder = LOCAL / "go" / program.module
    with step(f"build {program.name}"):
        extra = _from_source(program, target.parent, environ, folder) if program.source else [program.package]
        run([*argv, *extra], environ=environ, cwd=folder)
    partial.replace(target)


def _from_source(program: Program, beside: Path, environ: Mapping[str, str], folder: Path) -> list[str]:
    """Copy the published module's manifests beside the binary; gives what to build, with the patch."""
    go = go_command()
    run([go, "mod", "download", program.source], environ=environ, cwd=folder)
    place = run([go, "list", "-m", "-f", "{{.Dir}}", program.source], environ=environ, cwd=folder)
    source = Path(place.strip())
    if program.manifests:
        shutil.rmtree(beside / program.manifests, ignore_errors=True)
        # The folders of the module cache may not be written; their copies may.
        shutil.copytree(source / program.manifests, beside / program.manifests, copy_function=shutil.copyfile)
        for path in (beside / program.manifests, *(beside / program.manifests).rglob("*/")):
            path.chmod(0o755)
    if program.patch is None:
        return [program.package]
    text = (source / program.patch.file).read_text()
    if program.patch.old not in text:
        raise ClusterError(
            f"{program.source}/{program.patch.file}: {program.patch.old} is not there any more"
        )
    patched, overlay = beside / "patched.go", beside / "overlay.json"
    patched.write_text(text.replace(program.patch.old, program.patch.new))
    # Go lays nothing over its module cache, so the package seems to stand in our module.
    overlay.write_text(json.dumps({"Replace": {str(folder / "patched" / "main.go"): str(patched)}}))
    return ["-overlay", str(overlay), "./patched"]
