"""The CRDs are what the pydantic models say, and what Kubernetes calls structural."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from yuan2_core.conflicts import QLORA_STAGE_3
from yuan2_core.presets import PRESETS, zero_stage
from yuan2_core.sections import LoRA, Training
from yuan2_operator.api import crd
from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.api.schema import Spec, Status
from yuan2_operator.api.service import ServiceSpec

ROOT = Path(__file__).parents[3]
FINETUNE = "Yuan2FineTune"
RULES = "x-kubernetes-validations"
DEFINITIONS = {kind.kind: crd.definition(kind) for kind in crd.KINDS}


def schema(kind: str) -> dict[str, Any]:
    [version] = DEFINITIONS[kind]["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from nodes(node[key], f"{path}[]")


ALL_NODES = [(kind, path, node) for kind in DEFINITIONS for path, node in nodes(schema(kind))]


def test_the_committed_files_are_what_the_models_say():
    assert crd.stale(ROOT / "crds") == []


def test_a_stale_missing_or_foreign_file_is_told(tmp_path, capsys):
    assert crd.main([str(tmp_path)]) == 0
    assert crd.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "kustomization.yaml").unlink()
    (tmp_path / "yuan2.dev_yuan2services.yaml").write_text("{}")
    (tmp_path / "other.yaml").write_text("{}")
    assert crd.main(["--check", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert all(name in told for name in ("kustomization.yaml", "yuan2services.yaml", "other.yaml"))


def test_the_files_are_the_definitions():
    files = crd.files()
    for kind in crd.KINDS:
        assert yaml.safe_load(files[f"yuan2.dev_{kind.plural}.yaml"]) == crd.definition(kind)


@pytest.mark.parametrize("key", ["$ref", "$defs", "title", "const", "oneOf", "allOf"])
def test_nothing_is_left_that_a_structural_schema_may_not_have(key):
    assert not [path for _, path, node in ALL_NODES if key in node]


def test_the_rules_know_the_default_stage_of_every_size_and_method():
    sentences = {rule["message"]: rule["rule"] for rule in schema(FINETUNE)["properties"]["spec"][RULES]}
    large = [size for size in PRESETS if zero_stage(size) == 3]
    assert large == ["51B", "102B"]
    assert (zero_stage("2B"), zero_stage("custom"), zero_stage("102B", "qlora")) == (2, 2, 0)
    assert f"has(self.method.qlora) ? 0 : self.model.size in {large} ? 3 : 2" in sentences[QLORA_STAGE_3]


def test_every_node_has_one_type():
    untyped = [
        path
        for _, path, node in ALL_NODES
        if not isinstance(node.get("type"), str) and not node.get("x-kubernetes-int-or-string")
    ]
    assert untyped == []


def test_only_the_documents_of_others_accept_anything():
    free = [path for _, path, node in ALL_NODES if "x-kubernetes-preserve-unknown-fields" in node]
    templates = ["workers", "worker", "controller", "api", "web"]
    assert free == [
        ".spec.deepspeed.overrides",
        *(f".spec.{section}.podTemplate.spec" for section in templates),
    ]
    empty = [path for _, path, node in ALL_NODES if node.get("type") == "object" and set(node) == {"type"}]
    assert set(empty) == {".metadata"}


def test_every_field_that_a_user_writes_is_described():
    silent = [
        path
        for _, path, node in ALL_NODES
        if path.startswith((".spec", ".status"))
        and not path.endswith("[]")
        and len(node.get("description", "")) < 5
    ]
    assert silent == []


def test_bounds_that_exclude_are_whole_numbers():
    """Where a value is a whole number, the API server cuts the bound to one: 0 is not less than 0.5 there."""
    for _, path, node in ALL_NODES:
        for bound, excludes in (("maximum", "exclusiveMaximum"), ("minimum", "exclusiveMinimum")):
            assert not node.get(excludes) or node[bound] == int(node[bound]), path


def test_every_rule_has_a_sentence():
    for _, path, node in ALL_NODES:
        for rule in node.get(RULES, ()):
            assert len(rule["message"].split()) >= 5, path


def test_lists_and_texts_are_bounded_so_that_rules_stay_cheap():
    unbounded = [
        path
        for _, path, node in ALL_NODES
        if path.startswith(".spec") and node.get("type") == "array" and "maxItems" not in node
    ]
    assert unbounded == []


@pytest.mark.parametrize(
    ("kind", "model", "body"),
    [
        (
            "Yuan2FineTune",
            FineTuneSpec,
            {
                "model": {
                    "size": "2B",
                    "source": {"persistentVolumeClaim": {"claimName": "m", "path": "base"}},
                },
                "dataset": {"source": {"configMap": {"name": "data", "key": "a.json"}}},
                "method": {"lora": {"r": 4}},
                "workers": {"processesPerWorker": 1},
                "output": {"persistentVolumeClaim": {"claimName": "m", "path": "out"}},
            },
        ),
        (
            "Yuan2Service",
            ServiceSpec,
            {"model": {"name": "yuan2", "fineTuneRef": {"name": "tuned"}}},
        ),
    ],
)
def test_the_defaults_of_the_schema_are_those_of_the_models(kind, model, body):
    filled = fill(schema(kind)["properties"]["spec"], body)
    assert model.model_validate(filled) == model.model_validate(body)
    given = model.model_validate(body).model_dump(mode="json", by_alias=True, exclude_none=True)
    if kind == "Yuan2FineTune":
        # The plan decides it by the size, which takes knowing that nobody gave it.
        assert given["checkpoint"].pop("keep") == 10
        assert "keep" not in filled["checkpoint"]
    assert drop_empty(filled) == drop_empty(given)


def fill(node: dict[str, Any], value: Any) -> Any:
    """Defaulting as the API server does it: from the outside in."""
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, child in node.get("properties", {}).items():
        if name not in filled and "default" in child:
            filled[name] = child["default"]
        if name in filled:
            filled[name] = fill(child, filled[name])
    return filled


def drop_empty(value: Any) -> Any:
    """Empty lists and maps mean the same as absent ones."""
    if not isinstance(value, dict):
        return value
    kept = {key: drop_empty(member) for key, member in value.items()}
    return {key: member for key, member in kept.items() if member not in ({}, [])}


def test_the_scale_subresource_is_the_services_only():
    subresources = {
        kind: definition["spec"]["versions"][0]["subresources"] for kind, definition in DEFINITIONS.items()
    }
    assert subresources["Yuan2FineTune"] == {"status": {}}
    assert subresources["Yuan2Service"]["scale"] == {
        "specReplicasPath": ".spec.worker.replicas",
        "statusReplicasPath": ".status.workerReplicas",
        "labelSelectorPath": ".status.selector",
    }


def test_every_printer_column_and_scale_path_exists():
    for kind, definition in DEFINITIONS.items():
        [version] = definition["spec"]["versions"]
        paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
        paths += version["subresources"].get("scale", {}).values()
        known = {path for path, _ in nodes(schema(kind))}
        for path in paths:
            plain = path.split("[")[0]
            assert plain in known or plain.startswith(".metadata."), path


class Small(Spec):
    """An example."""

    ratio: float | None = Field(default=None, gt=0)
    """A number."""
    mode: Literal["only"] = "only"
    """A single choice."""
    names: list[str] = Field(default_factory=list)
    """A list."""


class Outer(Status):
    """An example of a part."""

    required: Small
    """Must be there."""
    optional: Small | None = None
    """May be absent."""
    section: Small = Field(default_factory=Small)
    """Absent means empty."""


def test_null_means_absent_and_bounds_are_flags():
    ratio = crd.structural_schema(Small)["properties"]["ratio"]
    assert ratio == {"description": "A number.", "type": "number", "minimum": 0, "exclusiveMinimum": True}


def test_a_value_that_is_refused_for_a_reason_is_refused_by_a_rule():
    precision = crd.structural_schema(Training)["properties"]["precision"]
    [rule] = precision[RULES]
    assert "enum" not in precision
    assert rule["rule"] == "self in ['bf16', 'fp32']"
    assert "fp16 cannot train Yuan 2.0: its weights are bf16" in rule["message"]


def test_a_list_of_distinct_items_is_a_set():
    modules = crd.structural_schema(LoRA)["properties"]["targetModules"]
    assert (modules["x-kubernetes-list-type"], modules["maxItems"]) == ("set", 7)
    assert "uniqueItems" not in modules


def test_a_single_choice_is_an_enum_of_one():
    mode = crd.structural_schema(Small)["properties"]["mode"]
    assert (mode["type"], mode["enum"], mode["default"]) == ("string", ["only"], "only")


def test_only_a_section_that_counts_as_empty_gets_a_default():
    parts = crd.structural_schema(Outer)
    assert parts["required"] == ["required"]
    assert parts["properties"]["section"]["default"] == {}
    assert "default" not in parts["properties"]["optional"]
    assert "default" not in parts["properties"]["required"]
    assert parts["properties"]["optional"]["description"] == "May be absent."
