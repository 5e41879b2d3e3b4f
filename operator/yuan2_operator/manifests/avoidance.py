"""Keeping pods away from nodes on which a run has failed, beside whatever affinity they have. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from yuan2_operator.manifests.common import Manifest

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
WEIGHT = 100


def avoiding(template: Manifest, nodes: Sequence[str], *, required: bool) -> Manifest:
    """A pod template whose pods are not scheduled to `nodes` or, unless `required`, only if no other fits.

    `required` goes into each of the alternatives that a node may fulfil, since one of them is enough.
    """
    if not nodes:
        return template
    # The API takes one name in each comparison of metadata.name.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in nodes]
    affinity = template["spec"].get("affinity", {})
    rules = affinity.get("nodeAffinity", {})
    if required:
        terms = rules.get(REQUIRED, {}).get("nodeSelectorTerms") or [{}]
        kept = [{**term, "matchFields": [*term.get("matchFields", []), *fields]} for term in terms]
        rules = {**rules, REQUIRED: {"nodeSelectorTerms": kept}}
    else:
        wish = {"weight": WEIGHT, "preference": {"matchFields": fields}}
        rules = {**rules, PREFERRED: [*rules.get(PREFERRED, []), wish]}
    return {**template, "spec": {**template["spec"], "affinity": {**affinity, "nodeAffinity": rules}}}
