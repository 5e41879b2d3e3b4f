"""The documents agree with the code they describe."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.support.finetunes import MINIMAL, merged
from yuan2_core.estimate import find_gpu
from yuan2_core.presets import PRESETS
from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.api.service import ServiceSpec

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
SPECS: dict[str, type[FineTuneSpec | ServiceSpec]] = {
    "Yuan2FineTune": FineTuneSpec,
    "Yuan2Service": ServiceSpec,
}


def check(kind: str, spec: Mapping[str, Any]) -> FineTuneSpec | ServiceSpec:
    """The spec, read as strictly as the API server does: pydantic would take a string for a number."""
    return SPECS[kind].model_validate_json(json.dumps(spec), strict=True)


def load_fields() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fields", ROOT / "docs/fields.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_field_tables_are_those_of_the_crds() -> None:
    assert load_fields().main(["--check"]) == 0, "run `python docs/fields.py`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_yaml_in_the_documents_fits_the_resources(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for document in yaml.safe_load_all(block):
            if document.get("kind") in SPECS:
                check(document["kind"], document["spec"])
            elif set(document) == {"spec"}:
                # A page about a part of a Yuan2FineTune shows only that part.
                check("Yuan2FineTune", merged(MINIMAL, document["spec"]))


def test_a_number_that_yaml_reads_as_text_is_seen() -> None:
    training = yaml.safe_load("{learningRate: 2e-4}")
    with pytest.raises(ValidationError, match=r"learningRate\n.*valid number"):
        check("Yuan2FineTune", merged(MINIMAL, {"training": training}))


def test_the_readme_fills_the_claims_that_its_example_reads() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    documents = [
        document
        for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
        for document in yaml.safe_load_all(block)
    ]
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    mounts = {f"/{claim}" for claim in claims}
    spec = next(d["spec"] for d in documents if d["kind"] == "Yuan2FineTune")
    for part in (spec["model"], spec["dataset"]):
        place = part["source"]["persistentVolumeClaim"]
        assert f"/{place['claimName']}" in mounts
        assert f" files:/{place['claimName']}/{place['path']}\n" in readme
    pod = next(d["spec"] for d in documents if d["kind"] == "Pod")
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == mounts


RESOURCES = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if "yuan2.dev/v1alpha1" in path.read_text("utf-8")
]


@pytest.mark.parametrize("manifest", RESOURCES, ids=name)
def test_the_manifests_of_the_examples_fit_the_resources(manifest: Path) -> None:
    document = yaml.safe_load(manifest.read_text("utf-8"))
    assert check(document["kind"], document["spec"])


def test_the_service_of_the_adapters_asks_for_a_gpu_that_holds_the_model() -> None:
    tuned, served = (
        yaml.safe_load((ROOT / "examples/adapters" / file).read_text("utf-8"))
        for file in ("lora.yaml", "service.yaml")
    )
    assert served["spec"]["model"]["fineTuneRef"]["name"] == tuned["metadata"]["name"]
    weights = 2 * PRESETS[tuned["spec"]["model"]["size"]].parameters
    gpu = find_gpu(served["spec"]["worker"]["nodeSelector"]["nvidia.com/gpu.product"])
    assert gpu is not None
    gpus = served["spec"]["worker"]["gpusPerWorker"]
    assert weights < 0.8 * gpus * gpu.memory_bytes, "the rest is for the caches"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`make ([a-z0-9-]+)", page.read_text("utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
