"""The operator and the example on a cluster: kustomize overlays that name the images just built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yuan2_local.paths import REPOSITORY

NAMESPACE = "yuan2-demo"
"""Where the example runs."""
OPERATOR_NAMESPACE = "yuan2-system"
OPERATOR = "yuan2-operator"
INSTALLED_BY = "yuan2.dev/installed-by"
"""Label on what the demo installed, so that it never removes an operator that somebody else did."""
NAME = "identity"
"""The Yuan2FineTune and the Yuan2Service of the example."""
IMAGES = ("train", "serve", "operator")
EXAMPLE = REPOSITORY / "examples" / "identity"
CONVERSATIONS = EXAMPLE / "conversations.json"

_BUILD = REPOSITORY / "build" / "demo"
_KUSTOMIZATION = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


def split_reference(reference: str) -> dict[str, str]:
    """An image reference as kustomize's `images` wants it: newName and newTag or digest.

    >>> split_reference("localhost:5000/yuan2/train:abc")
    {'newName': 'localhost:5000/yuan2/train', 'newTag': 'abc'}
    """
    if "@" in reference:
        name, _, digest = reference.partition("@")
        return {"newName": name, "digest": digest}
    name, colon, tag = reference.rpartition(":")
    if not colon or "/" in tag:
        return {"newName": reference, "newTag": "latest"}
    return {"newName": name, "newTag": tag}


def operator_overlay(images: Mapping[str, str]) -> dict[str, Any]:
    """deploy/base with the three images; train and serve are settings of the operator."""
    return _KUSTOMIZATION | {
        "resources": ["../../../deploy/base"],
        "images": [{"name": "yuan2/operator", **split_reference(images["operator"])}],
        "configMapGenerator": [
            {
                "name": "yuan2-operator-settings",
                "namespace": OPERATOR_NAMESPACE,
                "behavior": "merge",
                "literals": [
                    f"YUAN2_TRAIN_IMAGE={images['train']}",
                    f"YUAN2_SERVE_IMAGE={images['serve']}",
                ],
            }
        ],
        "labels": [{"pairs": {INSTALLED_BY: "demo"}}],
    }


def example_overlay(images: Mapping[str, str]) -> dict[str, Any]:
    """examples/identity in the demo's namespace, its base model made by the train image."""
    return _KUSTOMIZATION | {
        "namespace": NAMESPACE,
        "resources": ["../../../examples/identity"],
        "images": [{"name": "yuan2/train", **split_reference(images["train"])}],
    }


def namespace() -> dict[str, Any]:
    """The demo's namespace, labelled as its own."""
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {INSTALLED_BY: "demo"}},
    }


def write_overlay(name: str, overlay: Mapping[str, Any]) -> Path:
    """Write build/demo/NAME/kustomization.yaml (JSON, which is YAML) and return its folder."""
    folder = _BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(json.dumps(overlay, indent=2) + "\n")
    return folder


def write_manifest(name: str, manifest: Mapping[str, Any]) -> Path:
    """Write build/demo/NAME.json and return its path."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    path = _BUILD / f"{name}.json"
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return path


def installed_by_demo(obj: Mapping[str, Any] | None) -> bool:
    """Whether the object exists and carries the demo's label."""
    return bool(obj) and (obj or {}).get("metadata", {}).get("labels", {}).get(INSTALLED_BY) == "demo"
