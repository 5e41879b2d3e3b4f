"""The documents agree with the code they describe."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.support.finetunes import MINIMAL, merged
from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.api.service import ServiceSpec

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
SPECS = {"Yuan2FineTune": FineTuneSpec, "Yuan2Service": ServiceSpec}


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
                SPECS[document["kind"]].model_validate(document["spec"])
            elif set(document) == {"spec"}:
                # A page about a part of a Yuan2FineTune shows only that part.
                FineTuneSpec.model_validate(merged(MINIMAL, document["spec"]))


RESOURCES = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if "yuan2.dev/v1alpha1" in path.read_text("utf-8")
]


@pytest.mark.parametrize("manifest", RESOURCES, ids=name)
def test_the_manifests_of_the_examples_fit_the_resources(manifest: Path) -> None:
    document = yaml.safe_load(manifest.read_text("utf-8"))
    assert SPECS[document["kind"]].model_validate(document["spec"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`make ([a-z0-9-]+)", page.read_text("utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
