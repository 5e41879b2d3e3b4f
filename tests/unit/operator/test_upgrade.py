"""Objects of the release before (tests/golden/previous) under this one: what runs goes on.

The files are those of commit 03a9fc8: its CRDs, a Yuan2FineTune as its API server stored it with the status
that its operator wrote, and the children that it made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.attempts import START, accepted
from yuan2_operator.api.crd import KINDS, definition
from yuan2_operator.api.finetune import FineTuneSpec, FineTuneStatus
from yuan2_operator.cache import slim
from yuan2_operator.manifests.finetune import finetune_manifests
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune
from yuan2_operator.plan.owner import Owner
from yuan2_operator.reconcile.finetune import build_world, repairable
from yuan2_operator.reconcile.refusal import Reading, parse_spec
from yuan2_operator.status.attempts import advance, read_ledger, unwanted
from yuan2_operator.status.finetune import Finding, compose

PREVIOUS = Path(__file__).parents[2] / "golden" / "previous"
TUNE: dict[str, Any] = yaml.safe_load((PREVIOUS / "finetune.yaml").read_text())
CHILDREN = {child["kind"]: child for child in yaml.safe_load_all((PREVIOUS / "children.yaml").read_text())}
NOW = START + timedelta(hours=1)


def pods() -> list[dict[str, Any]]:
    """Pods that the Job of the release before has made."""
    template = CHILDREN["Job"]["spec"]["template"]
    made = []
    for index in (0, 1):
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-completion-index": str(index)}
        metadata = {"name": f"identity-1-{index}", "labels": labels, "ownerReferences": [{"uid": "job"}]}
        state = {"name": "pytorch", "state": {"running": {"startedAt": "2026-01-01T00:00:10Z"}}}
        status = {"phase": "Running", "containerStatuses": [state]}
        made.append({"kind": "Pod", "metadata": metadata, "spec": template["spec"], "status": status})
    return [slim(pod) for pod in made]


def world():
    job = CHILDREN["Job"]
    return build_world(
        [slim({**job, "metadata": {**job["metadata"], "uid": "job"}})], pods(), strangers=False, now=NOW
    )


def test_what_was_stored_is_read():
    reading = parse_spec(FineTuneSpec, TUNE["spec"], runs=False)
    assert reading == Reading(FineTuneSpec.model_validate(TUNE["spec"]))
    assert FineTuneStatus.model_validate(TUNE["status"]).to_api() == {
        **TUNE["status"],
        "disruptions": 0,
        "disruptionReasons": {},
        "disruptionsWithoutProgress": 0,
        "nodeFailures": {},
        "nodes": [],
    }


def test_an_attempt_that_runs_goes_on_with_its_image_and_is_looked_after():
    spec, prior = FineTuneSpec.model_validate(TUNE["spec"]), FineTuneStatus.model_validate(TUNE["status"])
    ledger = advance(read_ledger(prior), world(), spec.run_policy, accepted=True, now=NOW)
    assert (ledger.number, ledger.restarts, ledger.ending) == (1, 0, None)
    assert ledger.open is not None
    assert (ledger.open.running_time, ledger.open.image) == (NOW, "registry.example/yuan2/train:1")
    assert unwanted(ledger, world()) == []
    status = compose(spec, prior, Finding("uid", 1, ledger, world(), accepted()), NOW)
    assert (status.phase, status.step, status.progress) == ("Running", 30, "30/100")


def test_its_children_are_neither_made_again_nor_changed():
    plan = plan_finetune(
        Owner.of(TUNE),
        FineTuneSpec.model_validate(TUNE["spec"]),
        attempt=1,
        restarts=0,
        missing=(),
        default_image="another",
    )
    assert isinstance(plan, FineTunePlan)
    job = world().view(1).job
    assert job is not None
    assert (job.config, job.name) == (None, "identity-1")
    [service] = repairable(finetune_manifests(plan), job.config)
    before = CHILDREN["Service"]
    # A port that only rank 0 served has left the Service; no pod notices.
    ports = [port for port in before["spec"]["ports"] if port["name"] != "progress"]
    assert service == {**before, "spec": {**before["spec"], "ports": ports}}


def fields(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node of a structural schema with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from fields(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            yield from fields(schema[key], f"{path}[]")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_no_field_of_the_release_before_is_gone_narrower_or_newly_required(kind):
    before = yaml.safe_load((PREVIOUS / f"yuan2.dev_{kind.plural}.yaml").read_text())
    [old], [new] = (
        [version["schema"]["openAPIV3Schema"] for version in document["spec"]["versions"]]
        for document in (before, definition(kind))
    )
    now = dict(fields(new))
    for path, schema in fields(old):
        assert path in now, path
        assert now[path].get("type") == schema.get("type"), path
        assert set(schema.get("enum", ())) <= set(now[path].get("enum", schema.get("enum", ()))), path
        assert set(now[path].get("required", ())) <= set(schema.get("required", ())), path
