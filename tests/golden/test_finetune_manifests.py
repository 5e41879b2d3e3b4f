"""Whole manifests of a FineTune, compared with files: what changes here changes in every cluster.

The code under test wrote those files. What a reader can derive from the resource alone is asserted of them
below, and tests/integration/operator/test_manifests.py gives them to a real API server.

`YUAN2_UPDATE_GOLDEN=1` writes the files anew; look at the difference before it is committed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.manifests.finetune import finetune_manifests
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune
from yuan2_operator.plan.owner import Owner

FOLDER = Path(__file__).parent / "manifests"
CASES = [("cpu", 1, 0), ("gpu", 3, 2), ("qlora", 1, 0)]


def resource_of(case: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / f"{case}.in.yaml").read_text()))


@pytest.mark.parametrize(("case", "attempt", "restarts"), CASES)
def test_manifests_are_those_of_the_file(case, attempt, restarts):
    resource = resource_of(case)
    plan = plan_finetune(
        Owner.of(resource),
        FineTuneSpec.model_validate(resource["spec"]),
        attempt=attempt,
        restarts=restarts,
        missing=(),
        default_image="registry.example/yuan2/train:1",
    )
    assert isinstance(plan, FineTunePlan)
    manifests = finetune_manifests(plan)
    expected = FOLDER / f"{case}.out.yaml"
    if os.environ.get("YUAN2_UPDATE_GOLDEN"):
        expected.write_text(yaml.safe_dump_all(manifests, sort_keys=False, width=110, allow_unicode=True))
    assert manifests == list(yaml.safe_load_all(expected.read_text()))


@pytest.mark.parametrize(("case", "attempt", "restarts"), CASES)
def test_the_files_say_what_the_resource_asks_for(case, attempt, restarts):
    resource = resource_of(case)
    name, spec = resource["metadata"]["name"], resource["spec"]
    objects = {item["kind"]: item for item in yaml.safe_load_all((FOLDER / f"{case}.out.yaml").read_text())}
    assert list(objects) == ["ConfigMap", "Service", "Job"]
    pods, gpus = spec["workers"].get("replicas", 1), spec["workers"].get("gpusPerWorker", 0)
    ranks = gpus or spec["workers"].get("processesPerWorker", 1)
    job, pod = objects["Job"]["spec"], objects["Job"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert objects["Job"]["metadata"]["name"] == f"{name}-{attempt}"
    assert objects["Job"]["metadata"]["annotations"]["yuan2.dev/restarts"] == str(restarts)
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (pods, pods, "Indexed")
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert container["resources"].get("limits", {}).get("nvidia.com/gpu") == (str(gpus) if gpus else None)
    assert environment["WORLD_SIZE"] == str(pods * ranks)
    assert (environment["PET_NNODES"], environment["PET_NPROC_PER_NODE"]) == (str(pods), str(ranks))
    assert environment["MASTER_ADDR"] == f"{name}-{attempt}-0.{objects['Service']['metadata']['name']}"
    told = json.loads(objects["ConfigMap"]["data"]["job.json"])
    assert (told["launch"]["nodes"], told["launch"]["processesPerNode"]) == (pods, ranks)
    places = {
        told["model"]["path"]: claim_of(spec["model"]["source"]),
        told["dataset"]["path"]: claim_of(spec["dataset"]["source"]),
        told["output"]: claim_of(spec["output"]),
    }
    for path, claim in places.items():
        assert claim is None or path == f"/mnt/claims/{claim['claimName']}/{claim['path']}"
    claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]} - {None}
    assert claims == {claim["claimName"] for claim in places.values() if claim is not None}
    for key, value in spec.get("training", {}).items():
        assert told["training"][key] == (float(value) if key == "learningRate" else value)


def claim_of(source: dict[str, Any]) -> dict[str, str] | None:
    """The claim and path of a source, None for one of another kind."""
    return source.get("persistentVolumeClaim")
