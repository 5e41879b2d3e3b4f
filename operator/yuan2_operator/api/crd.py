"""The pydantic models as CustomResourceDefinitions.

    python -m yuan2_operator.api.crd crds            # writes
    python -m yuan2_operator.api.crd --check crds    # exits 1 if the files are not what would be written

Kubernetes wants a *structural* schema: no references, no null types, one type a node, `exclusiveMinimum` as
a flag. The rest is as pydantic says it; CEL rules and list types stand beside the fields, put there by
`schema.rules` and `list_map`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from yuan2_operator.api import finetune, finetune_rules, service
from yuan2_operator.constants import (
    CATEGORY,
    GROUP,
    KIND_FINETUNE,
    KIND_SERVICE,
    LABEL_PART_OF,
    PART_OF,
    PLURAL_FINETUNE,
    PLURAL_SERVICE,
    SHORT_FINETUNE,
    SHORT_SERVICE,
    VERSION,
)

HEADER = "# Generated from the pydantic models by `python -m yuan2_operator.api.crd crds`; do not edit.\n"
VALIDATIONS = "x-kubernetes-validations"
INT_OR_STRING = "x-kubernetes-int-or-string"

Schema = dict[str, Any]

_COPIED = (
    "type",
    "format",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "minimum",
    "maximum",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    INT_OR_STRING,
    VALIDATIONS,
)


@dataclass(frozen=True)
class Kind:
    """What a CustomResourceDefinition is made of."""

    kind: str
    plural: str
    short_name: str
    spec: type[BaseModel]
    status: type[BaseModel]
    description: str
    root_rules: Mapping[str, Any]
    printer_columns: list[dict[str, Any]]
    scale: Mapping[str, str] | None = None


KINDS = (
    Kind(
        kind=KIND_FINETUNE,
        plural=PLURAL_FINETUNE,
        short_name=SHORT_FINETUNE,
        spec=finetune.FineTuneSpec,
        status=finetune.FineTuneStatus,
        description="Trains a Yuan 2.0 model on conversations and leaves a model directory in a claim.",
        root_rules=finetune_rules.ROOT_RULES,
        printer_columns=finetune.PRINTER_COLUMNS,
    ),
    Kind(
        kind=KIND_SERVICE,
        plural=PLURAL_SERVICE,
        short_name=SHORT_SERVICE,
        spec=service.ServiceSpec,
        status=service.ServiceStatus,
        description="Serves a Yuan 2.0 model directory, or what a Yuan2FineTune made, to OpenAI clients.",
        root_rules=service.ROOT_RULES,
        printer_columns=service.PRINTER_COLUMNS,
        scale=service.SCALE,
    ),
)


def structural_schema(model: type[BaseModel]) -> Schema:
    """The structural OpenAPI v3 schema of a model."""
    schema = model.model_json_schema(by_alias=True)
    return _convert(schema, schema.get("$defs", {}))


def _convert(node: Schema, defs: Mapping[str, Schema]) -> Schema:
    node, _ = _resolve(node, defs)
    result: Schema = {}
    if "description" in node:
        result["description"] = " ".join(node["description"].split())
    result.update({key: node[key] for key in _COPIED if key in node})
    result.update(_translated(node))
    if "whyNotOthers" in node:
        _explain(result, node["whyNotOthers"])
    if "items" in node:
        result["items"] = _convert(node["items"], defs)
    if isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = _convert(node["additionalProperties"], defs)
    if node.get("required"):
        result["required"] = sorted(node["required"])
    if "properties" in node:
        required = set(node.get("required", ()))
        result["properties"] = {
            name: _property(child, defs, optional=name not in required)
            for name, child in node["properties"].items()
        }
    return result


def _translated(node: Schema) -> Schema:
    """What JSON Schema says otherwise than Kubernetes."""
    result: Schema = {}
    if INT_OR_STRING in node:
        result["anyOf"] = node["anyOf"]
    if "const" in node:
        result["enum"] = [node["const"]]
    if node.get("default") is not None and not node.get("decidedBySize"):
        result["default"] = node["default"]
    for bound in ("Minimum", "Maximum"):
        if f"exclusive{bound}" in node:
            result[bound.lower()] = node[f"exclusive{bound}"]
            result[f"exclusive{bound}"] = True
    if node.get("uniqueItems"):
        result["x-kubernetes-list-type"] = "set"
    if node.get("additionalProperties") is True:
        result["x-kubernetes-preserve-unknown-fields"] = True
    return result


def _explain(result: Schema, reason: str) -> None:
    """Turn an enum into a rule with a sentence: of an enum the API server only lists the values."""
    allowed = result.pop("enum")
    rule = {"rule": f"self in {allowed}", "message": f"write one of {', '.join(allowed)}: {reason}"}
    result["maxLength"] = 32
    result[VALIDATIONS] = [*result.get(VALIDATIONS, []), rule]


def _property(node: Schema, defs: Mapping[str, Schema], *, optional: bool) -> Schema:
    """A member of an object; a section that may be left out counts as empty, so that defaults fill it."""
    result = _convert(node, defs)
    _, nullable = _resolve(node, defs)
    if optional and not nullable and "properties" in result and "default" not in result:
        result["default"] = {}
    return result


def _resolve(node: Schema, defs: Mapping[str, Schema]) -> tuple[Schema, bool]:
    """The node with references and the null alternative folded in, and whether null was allowed."""
    nullable = False
    while True:
        if "$ref" in node:
            target = defs[node["$ref"].rsplit("/", 1)[-1]]
        elif "anyOf" in node and INT_OR_STRING not in node:
            [target] = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
            nullable = nullable or len(node["anyOf"]) > 1
        else:
            return node, nullable
        node = _overlay(target, {key: value for key, value in node.items() if key not in ("$ref", "anyOf")})


def _overlay(base: Schema, outer: Schema) -> Schema:
    """`outer` over `base`: what stands at the field wins over what stands at its type, and rules add up."""
    merged = {**base, **outer}
    validations = [*base.get(VALIDATIONS, []), *outer.get(VALIDATIONS, [])]
    return {**merged, VALIDATIONS: validations} if validations else merged


def definition(kind: Kind) -> Schema:
    """The CustomResourceDefinition of a kind."""
    root: Schema = {
        "description": kind.description,
        "type": "object",
        "required": ["spec"],
        **kind.root_rules,
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural_schema(kind.spec),
            "status": structural_schema(kind.status),
        },
    }
    subresources: Schema = {"status": {}}
    if kind.scale is not None:
        subresources["scale"] = dict(kind.scale)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}", "labels": {LABEL_PART_OF: PART_OF}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": [kind.short_name],
                "categories": [CATEGORY],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": root},
                    "subresources": subresources,
                    "additionalPrinterColumns": kind.printer_columns,
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Plain YAML: no anchors for what occurs twice, since other tools diff these files."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def render(kind: Kind) -> str:
    """The CustomResourceDefinition as a YAML file."""
    body = yaml.dump(definition(kind), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return HEADER + body


def files() -> dict[str, str]:
    """Name and text of every file below `crds/`, kustomization included."""
    texts = {f"{GROUP}_{kind.plural}.yaml": render(kind) for kind in KINDS}
    listing = yaml.safe_dump({"resources": sorted(texts)}, sort_keys=False)
    head = HEADER + "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
    return {**texts, "kustomization.yaml": head + listing}


def stale(directory: Path) -> list[str]:
    """Names of files that are missing, differ, or should not be there."""
    wanted = files()
    there = {path.name: path.read_text(encoding="utf-8") for path in directory.glob("*.yaml")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def main(arguments: list[str] | None = None) -> int:
    """Write or check the files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="yuan2_operator.api.crd", description="Generate the CRDs.")
    parser.add_argument("directory", type=Path, nargs="?", default=Path("crds"))
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    if options.check:
        differing = stale(options.directory)
        for name in differing:
            sys.stderr.write(f"{options.directory / name} is stale: run python -m yuan2_operator.api.crd\n")
        return 1 if differing else 0
    options.directory.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (options.directory / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
