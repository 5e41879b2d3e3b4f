"""Tags of images, the requirements that fit a base, and the pause image's archive."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from yuan2_local import images
from yuan2_local.apt import NEEDED, missing_packages
from yuan2_local.debian import mirror_of
from yuan2_local.errors import ClusterError
from yuan2_local.gobuild import PROGRAMS, binary_path, new_enough
from yuan2_local.images import DEFAULT, IMAGES, image_tag, plain_http_flags
from yuan2_local.oci import single_file_archive
from yuan2_local.paths import REPOSITORY, Cache
from yuan2_local.prune import stale_tags


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit", REPOSITORY / "deploy" / "images" / "fit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of everything that goes into the images."""
    for image in IMAGES.values():
        for name in (image.dockerfile, *image.inputs):
            source, target = REPOSITORY / name, tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(
                    source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(source, target)
    return tmp_path


def tags(root: Path) -> dict[str, str]:
    return {name: image_tag(name, root=root) for name in IMAGES}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("path", "rebuilt"),
    [
        ("trainer_image/yuan2_trainer/new.py", {"train"}),
        ("server_image/yuan2_server/new.py", {"serve"}),
        ("operator/yuan2_operator/new.py", {"operator"}),
        ("core/yuan2_core/new.py", {"train", "serve", "operator"}),
        ("core/yuan2_model/new.py", {"train", "serve"}),
        ("requirements/train.txt", {"base", "train", "serve"}),
        ("requirements/operator.txt", {"operator"}),
        ("deploy/local/base/Dockerfile.python", {"python", "base", "train", "serve", "operator"}),
        ("Dockerfile.train", {"train"}),
        ("README.md", set()),
    ],
)
def test_a_change_rebuilds_what_holds_it_and_nothing_else(tree: Path, path: str, rebuilt: set[str]) -> None:
    before = tags(tree)
    with (tree / path).open("a") as file:
        file.write("# changed\n")
    assert changed(before, tags(tree)) == rebuilt


def test_another_base_image_changes_train_and_serve_only(tree: Path) -> None:
    named = {name: image_tag(name, "nvcr.io/nvidia/pytorch:23.08-py3", tree) for name in IMAGES}
    assert changed(tags(tree), named) == {"train", "serve"}


def test_an_outside_cluster_needs_a_registry(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="REGISTRY"):
        images.build(Cache(tmp_path), DEFAULT, {"KUBECONFIG": "/home/someone/.kube/config"})


LOCK = """\
numpy==2.4.6 \\
    --hash=sha256:aa
nvidia-nccl-cu12==2.27.5 \\
    --hash=sha256:bb
torch==2.9.1 \\
    --hash=sha256:cc \\
    --hash=sha256:dd
    # via deepspeed
transformers==4.57.6 ; python_version >= "3.10" \\
    --hash=sha256:ee
"""
OLDER = """\
accelerate==1.15.0 \\
    --hash=sha256:11
pytest==8.0.0 \\
    --hash=sha256:22
torch==2.1.2 \\
    --hash=sha256:33
transformers==4.46.3 \\
    --hash=sha256:44
"""


def test_a_bare_base_gets_the_whole_lock(fit: ModuleType) -> None:
    assert list(fit.pins(fit.fit([LOCK, OLDER], {}))) == list(fit.pins(LOCK))


def test_the_torch_of_the_base_is_never_replaced(fit: ModuleType) -> None:
    fitted = fit.fit([LOCK, OLDER], {"torch": "2.9.1+cpu", "numpy": "1.26.4"})
    assert list(fit.pins(fitted)) == ["transformers"]
    assert "--hash=sha256:ee" in fitted


def test_a_base_with_an_old_torch_gets_the_older_pins_without_test_tools(fit: ModuleType) -> None:
    fitted = fit.pins(fit.fit([LOCK, OLDER], {"torch": "2.1.0a0+29c30b1", "numpy": "1.22.2"}))
    assert {name: version for name, (version, _) in fitted.items()} == {
        "accelerate": "1.15.0",
        "transformers": "4.46.3",
    }


@pytest.mark.parametrize("image", ["train", "serve"])
def test_the_published_base_gets_what_every_method_needs_around_its_torch_and_numpy(
    fit: ModuleType, image: str
) -> None:
    """nvcr.io/nvidia/pytorch:23.08-py3: Python 3.10, numpy 1.22.2 (NVIDIA's release notes)."""
    base = {"torch": "2.1.0a0+29c30b1", "numpy": "1.22.2", "matplotlib": "3.7.2", "tensorboard": "2.9.0"}
    locks = [(REPOSITORY / "requirements" / f"{name}.txt").read_text() for name in (image, "compat")]
    fitted = {name: version for name, (version, _) in fit.pins(fit.fit(locks, base)).items()}
    assert not [name for name in fitted if name.startswith(("torch", "triton", "numpy", "nvidia-"))]
    assert fitted["peft"] == "0.13.2"
    assert fitted["bitsandbytes"] == "0.45.5"
    assert {"accelerate", "tensorboard", "protobuf", "deepspeed"} <= set(fitted)
    assert fitted["matplotlib"].startswith("3.8.")  # later ones refuse numpy 1.22
    assert fitted["contourpy"].startswith("1.2.")


def test_a_base_that_has_everything_gets_nothing(fit: ModuleType) -> None:
    assert fit.fit([LOCK, OLDER], {"torch": "2.9.1", "numpy": "2.4.6", "transformers": "4.57.6"}) == ""


PYTHONS = ("3.10.6", "3.11.2", "3.12.3", "3.13.0", "3.14.0")


def test_every_pin_of_the_real_locks_is_read_with_a_hash(fit: ModuleType) -> None:
    for lock in ("dev", "train", "serve", "operator", "compat"):
        text = (REPOSITORY / "requirements" / f"{lock}.txt").read_text()
        read = [requirement for python in PYTHONS for _, requirement in fit.pins(text, python).values()]
        assert len(set(read)) == sum(line[:1].isalnum() and "==" in line for line in text.splitlines())
        assert all("--hash=sha256:" in requirement for requirement in read)


def test_a_pin_for_another_python_is_left_out(fit: ModuleType) -> None:
    lock = """\
numpy==2.2.6 ; python_full_version < '3.11' \\
    --hash=sha256:aa
numpy==2.4.6 ; python_full_version >= '3.11' \\
    --hash=sha256:bb
"""
    assert [fit.pins(lock, python)["numpy"][0] for python in PYTHONS[:2]] == ["2.2.6", "2.4.6"]
    assert "--hash=sha256:bb" not in fit.pins(lock, "3.10.6")["numpy"][1]


def test_the_archive_of_one_program_holds_blobs_under_their_digests(tmp_path: Path) -> None:
    program = tmp_path / "pause"
    program.write_bytes(b"\x7fELF")
    archive = tmp_path / "pause.tar"
    single_file_archive(program, "yuan2.dev/pause:1", archive)
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    for name, blob in files.items():
        if name.startswith("blobs/sha256/"):
            assert hashlib.sha256(blob).hexdigest() == name.rpartition("/")[2]
    manifest = json.loads(files["index.json"])["manifests"][0]
    assert manifest["annotations"]["io.containerd.image.name"] == "yuan2.dev/pause:1"
    layer = json.loads(files[f"blobs/sha256/{manifest['digest'][7:]}"])["layers"][0]
    with tarfile.open(fileobj=io.BytesIO(files[f"blobs/sha256/{layer['digest'][7:]}"])) as tar:
        assert [(member.name, member.mode) for member in tar.getmembers()] == [("pause", 0o755)]


def test_tags_that_nothing_names_are_stale(tmp_path: Path) -> None:
    tags_of = "docker/registry/v2/repositories/yuan2/{}/_manifests/tags/{}"
    for name, tag in (("train", "new"), ("train", "old"), ("serve", "new")):
        (tmp_path / tags_of.format(name, tag)).mkdir(parents=True)
    stale = stale_tags(tmp_path, {"yuan2/train:new", "yuan2/serve:new"})
    assert stale == [tmp_path / tags_of.format("train", "old")]


def test_only_missing_packages_are_installed() -> None:
    assert missing_packages(dict.fromkeys(NEEDED, True)) == []
    assert missing_packages({**dict.fromkeys(NEEDED, True), "/usr/sbin/runc": False}) == ["runc"]


def test_the_machines_own_debian_mirror_is_used() -> None:
    targets = "Debian http://mirror.example/debian-security/\nOther http://x/\nDebian http://mirror.example/debian/\n"
    assert mirror_of(targets) == "http://mirror.example/debian"
    assert mirror_of("") == "http://deb.debian.org/debian"


@pytest.mark.parametrize(
    ("version", "enough"), [("go1.19.8", False), ("go1.24", True), ("go1.26.8", True), ("devel +abc", True)]
)
def test_an_old_go_is_known(version: str, enough: bool) -> None:
    assert new_enough(version) is enough


def test_a_programs_binary_moves_with_its_sources(tmp_path: Path) -> None:
    folder = tmp_path / "pause"
    folder.mkdir()
    (folder / "go.mod").write_text("module pause\n")
    (folder / "main.go").write_text("package main\n")
    before = binary_path(Cache(tmp_path), PROGRAMS["pause"], tmp_path)
    (folder / "main.go").write_text("package main // changed\n")
    assert binary_path(Cache(tmp_path), PROGRAMS["pause"], tmp_path) != before


@pytest.mark.parametrize(
    ("registry", "plain"),
    [
        ("localhost:5001", True),
        ("127.0.0.1:5001/team", True),
        ("[::1]:5001", True),
        ("registry.example.com/team", False),
        ("localhost.example.com", False),
    ],
)
def test_only_a_registry_on_this_machine_may_speak_plain_http(registry: str, plain: bool) -> None:
    assert plain_http_flags(registry) == (["--tls-verify=false"] if plain else [])
