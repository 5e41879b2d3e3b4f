"""Laying a user's part of a pod over the operator's, as a strategic merge patch does. Pure.

The keys are those of core/v1's `patchMergeKey`
(https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/). Tolerations,
which have none, are added instead of replaced: what the operator tolerates stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yuan2_operator.api.pods import PodTemplate
from yuan2_operator.manifests.common import Manifest, container_security_context
from yuan2_operator.plan.pod_template import MERGE_KEYS


def laid_over(template: Manifest, overlay: PodTemplate | None) -> Manifest:
    """A pod template with a user's part over it; a container that is new gets the operator's security context
    as its base."""
    if overlay is None:
        return template
    metadata = dict(template["metadata"])
    for name, given in (("labels", overlay.metadata.labels), ("annotations", overlay.metadata.annotations)):
        if given:
            metadata[name] = {**metadata.get(name, {}), **given}
    known = {entry["name"] for entry in template["spec"]["containers"]}
    spec = merged(template["spec"], overlay.spec)
    for kind in ("containers", "initContainers"):
        if kind in spec:
            spec[kind] = [entry if entry["name"] in known else _confined(entry) for entry in spec[kind]]
    return {**template, "metadata": metadata, "spec": spec}


def merged(base: Mapping[str, Any], patch: Mapping[str, Any]) -> Manifest:
    """`patch` over `base`: objects by field, lists by key, null removes."""
    result = dict(base)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, Mapping):
            known = result.get(name)
            result[name] = merged(known if isinstance(known, Mapping) else {}, value)
        elif isinstance(value, list) and isinstance(result.get(name), list):
            result[name] = _lists(name, result[name], value)
        else:
            result[name] = value
    return result


def _lists(name: str, base: list[Any], patch: list[Any]) -> list[Any]:
    if name == "tolerations":
        return [*base, *(entry for entry in patch if entry not in base)]
    key = MERGE_KEYS.get(name)
    if key is None:
        return patch
    result = list(base)
    for entry in patch:
        place = next((index for index, known in enumerate(result) if known[key] == entry[key]), None)
        if place is None:
            result.append(entry)
        else:
            result[place] = _entry(name, result[place], entry)
    return result


def _entry(name: str, known: Manifest, entry: Manifest) -> Manifest:
    """An entry over the one of its key; a variable has one value, so it is replaced whole."""
    return entry if name == "env" else merged(known, entry)


def _confined(container: Manifest) -> Manifest:
    return {
        **container,
        "securityContext": merged(container_security_context(), container.get("securityContext", {})),
    }
