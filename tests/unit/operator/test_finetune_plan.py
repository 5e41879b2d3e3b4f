"""What a Yuan2FineTune becomes: one plan an attempt, or one sentence."""

from __future__ import annotations

import re

import pytest

from tests.support.attempts import spec_of
from yuan2_core.contract import TrainJob
from yuan2_operator.constants import KIND_FINETUNE, Reason
from yuan2_operator.manifests.finetune import environment, finetune_manifests, training_job
from yuan2_operator.plan.finetune import (
    FineTunePlan,
    config_name,
    plan_finetune,
    references,
    summary,
    train_job,
)
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.quantity import parse_quantity
from yuan2_operator.plan.references import Missing, Reference, Rejection
from yuan2_operator.reconcile.finetune import repairable

OWNER = Owner(KIND_FINETUNE, "alpaca", "demo", "uid-1", 1)
IMAGE = "registry.example/yuan2/train:1"


def decide(spec=None, **changes) -> FineTunePlan | Rejection:
    arguments = {"attempt": 1, "restarts": 0, "missing": (), "default_image": IMAGE, **changes}
    return plan_finetune(OWNER, spec or spec_of(), **arguments)


def plan_of(spec=None, **changes) -> FineTunePlan:
    plan = decide(spec, **changes)
    assert isinstance(plan, FineTunePlan), plan
    return plan


def pod_of(spec=None, **changes):
    return training_job(plan_of(spec, **changes))["spec"]["template"]["spec"]


def variables(spec=None) -> dict[str, object]:
    return {entry["name"]: entry.get("value") for entry in environment(plan_of(spec))}


def test_paths_are_below_the_mounts_of_their_claims():
    job = train_job(OWNER, spec_of(), 3)
    assert job.model.path == "/mnt/claims/models/base"
    assert job.dataset.path == "/mnt/claims/data/alpaca.json"
    assert job.output == "/mnt/claims/models/tuned"
    assert (job.attempt, job.launch.nodes, job.launch.device) == (3, 2, "cpu")
    assert TrainJob.model_validate_json(job.to_json()) == job


def test_small_data_comes_from_a_config_map():
    source = {"persistentVolumeClaim": None, "configMap": {"name": "talk", "key": "a.json"}}
    spec = spec_of(dataset={"source": source})
    assert train_job(OWNER, spec, 1).dataset.path == "/mnt/dataset/a.json"
    assert Reference("ConfigMap", "talk", "spec.dataset.source", "a.json") in references(spec)
    mounts = {mount["name"]: mount for mount in pod_of(spec)["containers"][0]["volumeMounts"]}
    assert mounts["dataset"]["readOnly"] is True


def test_data_to_evaluate_on_is_mounted_like_the_data():
    source = {"persistentVolumeClaim": {"claimName": "held-out", "path": "test.json"}}
    spec = spec_of(dataset={"evalSource": source})
    assert train_job(OWNER, spec, 1).dataset.eval_path == "/mnt/claims/held-out/test.json"
    assert Reference("PersistentVolumeClaim", "held-out", "spec.dataset.evalSource") in references(spec)
    mounts = {mount["mountPath"]: mount for mount in pod_of(spec)["containers"][0]["volumeMounts"]}
    assert mounts["/mnt/claims/held-out"]["readOnly"] is True


def test_one_config_map_may_hold_both():
    source, held_out = ({"configMap": {"name": "talk", "key": key}} for key in ("a.json", "b.json"))
    data = {"source": {"persistentVolumeClaim": None, **source}, "evalSource": held_out}
    spec = spec_of(dataset=data)
    job = train_job(OWNER, spec, 1)
    assert (job.dataset.path, job.dataset.eval_path) == ("/mnt/dataset/a.json", "/mnt/evaluation/b.json")
    assert Reference("ConfigMap", "talk", "spec.dataset.evalSource", "b.json") in references(spec)
    pod = pod_of(spec)
    configs = [
        volume["name"] for volume in pod["volumes"] if volume.get("configMap", {}).get("name") == "talk"
    ]
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    assert configs == ["dataset", "evaluation"]
    assert {"/mnt/dataset", "/mnt/evaluation"} <= set(mounts)


@pytest.mark.parametrize(
    ("size", "method", "given", "stage"),
    [
        ("2B", "full", None, 2),
        ("51B", "lora", None, 3),
        ("51B", "qlora", None, 0),
        ("102B", "full", 2, 2),
    ],
)
def test_the_stage_is_the_users_or_the_recipes(size, method, given, stage):
    spec = spec_of(model={"size": size}, method={"full": None, method: {}}, deepspeed={"stage": given})
    assert train_job(OWNER, spec, 1).stage == stage


def test_everything_that_shapes_a_run_reaches_the_trainer():
    spec = spec_of(
        method={"full": None, "lora": {"r": 4, "rsLora": True, "targetModules": ["down_proj"]}},
        dataset={"evalFraction": 0.1},
        deepspeed={"offload": "optimizer", "overrides": {"steps_per_print": 5}, "flopsProfiler": True},
        evaluation={"everySteps": 50, "earlyStoppingPatience": 3, "sampleAnswers": 0},
        output={"mergeAdapter": True, "tensorboard": True},
    )
    job = train_job(OWNER, spec, 1)
    assert job.method.lora is not None
    assert (job.method.lora.r, job.method.lora.target_modules) == (4, ("down_proj",))
    assert (job.deepspeed, job.evaluation) == (spec.deepspeed, spec.evaluation)
    assert (job.dataset.eval_fraction, job.merge_adapter, job.tensorboard) == (0.1, True, True)
    assert TrainJob.model_validate_json(job.to_json()) == job


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"deepspeed": {"overrides": {"zero_optimization": {"stage": 1}}}},
            "deepspeed.overrides: zero_optimization.stage is decided by deepspeed.stage; set that instead",
        ),
        ({"deepspeed": {"overrides": {"curriculum_learning": True}}}, "curriculum_learning has no effect"),
        ({"method": {"lora": {}}}, "method: set exactly one of full, lora and qlora"),
        ({"deepspeed": {"offload": "parameters"}}, "set deepspeed.stage to 3, or offload to optimizer"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused_before_a_pod_starts(changes, words):
    refused = decide(spec_of(**changes))
    assert isinstance(refused, Rejection)
    assert refused.reason == Reason.INVALID_SPEC
    assert words in refused.message


@pytest.mark.parametrize(
    ("workers", "text"),
    [
        ({"replicas": 2, "processesPerWorker": None, "gpusPerWorker": 8}, "plan: 2 pods × 8 GPUs, ZeRO-2"),
        ({"replicas": 1, "processesPerWorker": 2}, "plan: 1 pod × 2 CPU processes, ZeRO-2"),
        ({"replicas": 1, "processesPerWorker": None, "gpusPerWorker": 1}, "plan: 1 pod × 1 GPU, ZeRO-2"),
    ],
)
def test_the_plan_in_a_few_words(workers, text):
    assert summary(spec_of(workers=workers)) == text


def test_what_is_missing_is_named_with_its_field():
    missing = [Missing(reference) for reference in references(spec_of()) if reference.name == "data"]
    refused = decide(missing=missing)
    assert isinstance(refused, Rejection)
    assert refused.reason == Reason.CLAIM_NOT_FOUND
    assert refused.message == (
        "PersistentVolumeClaim data, named by spec.dataset.source, does not exist in namespace demo: "
        "create it, or correct the field; it is picked up when it appears"
    )


def test_a_config_map_without_the_key_is_named_with_it():
    talk = Reference("ConfigMap", "talk", "spec.dataset.source", "a.json")
    data = {"source": {"persistentVolumeClaim": None, "configMap": {"name": "talk", "key": "a.json"}}}
    refused = decide(spec_of(dataset=data), missing=[Missing(talk, key_only=True)])
    assert isinstance(refused, Rejection)
    assert refused.reason == Reason.CONFIG_MAP_KEY_NOT_FOUND
    assert refused.message.startswith(
        "ConfigMap talk, named by spec.dataset.source, has no key a.json: add it"
    )


def test_pull_secrets_must_exist():
    spec = spec_of(workers={"imagePullSecrets": [{"name": "pull"}]})
    assert Reference("Secret", "pull", "spec.workers.imagePullSecrets") in references(spec)


def test_without_an_image_there_is_no_plan():
    refused = decide(default_image="")
    assert isinstance(refused, Rejection)
    assert refused.reason == Reason.IMAGE_NOT_SET
    assert refused.message == (
        "no trainer image: set spec.workers.image, or YUAN2_TRAIN_IMAGE in the operator's settings"
    )
    assert plan_of(spec_of(workers={"image": "mine:1"}), default_image="").image == "mine:1"


def test_each_claim_is_mounted_once_and_only_the_output_can_be_written():
    mounts = {mount["mountPath"]: mount for mount in pod_of()["containers"][0]["volumeMounts"]}
    assert mounts["/mnt/claims/data"]["readOnly"] is True
    assert "readOnly" not in mounts["/mnt/claims/models"]
    assert len([volume for volume in pod_of()["volumes"] if "persistentVolumeClaim" in volume]) == 2


def test_the_environment_is_that_of_a_pytorchjob():
    env = variables(spec_of(workers={"replicas": 2, "processesPerWorker": 3}))
    assert env["MASTER_ADDR"] == env["PET_MASTER_ADDR"] == "alpaca-1-0.alpaca"
    assert env["MASTER_PORT"] == env["PET_MASTER_PORT"] == "23456"
    assert (env["WORLD_SIZE"], env["PET_NNODES"], env["PET_NPROC_PER_NODE"]) == ("6", "2", "3")
    assert env["PYTHONUNBUFFERED"] == "1"
    ranks = [entry for entry in environment(plan_of()) if entry["name"] in ("RANK", "PET_NODE_RANK")]
    fields = {entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in ranks}
    assert fields == {"metadata.annotations['batch.kubernetes.io/job-completion-index']"}


@pytest.mark.parametrize(
    ("resources", "processes", "threads"),
    [
        ({"requests": {"cpu": "4"}}, 2, "2"),
        ({"requests": {"cpu": "500m"}, "limits": {"cpu": "6"}}, 2, "3"),
        ({"requests": {"cpu": "500m"}}, 2, "1"),
        (None, 2, None),
    ],
)
def test_processes_share_the_cpus_that_were_asked_for(resources, processes, threads):
    workers = {"processesPerWorker": processes, "resources": resources}
    assert variables(spec_of(workers=workers)).get("OMP_NUM_THREADS") == threads


def test_the_users_variables_win_where_the_operator_only_proposes():
    env = variables(spec_of(workers={"env": [{"name": "OMP_NUM_THREADS", "value": "7"}]}))
    assert env["OMP_NUM_THREADS"] == "7"


def test_gpus_are_asked_for_and_the_device_follows():
    spec = spec_of(workers={"processesPerWorker": None, "gpusPerWorker": 8})
    container = pod_of(spec)["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert train_job(OWNER, spec, 1).launch.device == "cuda"
    assert train_job(OWNER, spec, 1).launch.processes_per_node == 8


def test_a_pod_holds_no_credentials_and_no_privilege():
    pod = pod_of()
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["containers"][0]["name"] == "pytorch"
    assert pod["restartPolicy"] == "Never"


def test_a_dead_node_is_given_up_soon_unless_the_user_says_otherwise():
    taints = {toleration["key"]: toleration for toleration in pod_of()["tolerations"]}
    assert taints["node.kubernetes.io/unreachable"]["tolerationSeconds"] == 60
    mine = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 999}
    given = pod_of(spec_of(workers={"tolerations": [mine]}))["tolerations"]
    assert [entry["tolerationSeconds"] for entry in given if entry["key"] == mine["key"]] == [999]
    everything = pod_of(spec_of(workers={"tolerations": [{"operator": "Exists"}]}))["tolerations"]
    assert everything == [{"operator": "Exists"}]


def test_another_job_file_has_another_name_and_the_job_names_its_own():
    plain, again, other = plan_of(), plan_of(), plan_of(spec_of(training={"learningRate": 0.5}))
    assert config_name(plain) == config_name(again) != config_name(other)
    assert re.fullmatch("alpaca-1-[0-9a-f]{8}", config_name(plain))
    config, _, job = finetune_manifests(other)
    assert (config["metadata"]["name"], config["immutable"]) == (config_name(other), True)
    [volume] = [entry for entry in job["spec"]["template"]["spec"]["volumes"] if entry["name"] == "job"]
    assert volume["configMap"] == {"name": config_name(other)}


def test_only_the_job_file_that_a_job_names_is_made_again_for_it():
    manifests = finetune_manifests(plan_of())
    names = [manifest["kind"] for manifest in repairable(manifests, config_name(plan_of()))]
    assert names == ["ConfigMap", "Service"]
    assert [manifest["kind"] for manifest in repairable(manifests, "alpaca-1-00000000")] == ["Service"]
    assert [manifest["kind"] for manifest in repairable(manifests, None)] == ["Service"]


@pytest.mark.parametrize(
    ("size", "given", "seconds"),
    [("2B", None, 180), ("51B", None, 600), ("102B", None, 900), ("custom", None, 300), ("2B", 7, 7)],
)
def test_the_grace_follows_from_the_size_unless_it_is_given(size, given, seconds):
    spec = spec_of(model={"size": size}, workers={"terminationGracePeriodSeconds": given})
    assert pod_of(spec)["terminationGracePeriodSeconds"] == seconds


NOTHING = {"resources": {"requests": None}}
ON_GPUS = {"processesPerWorker": None, "gpusPerWorker": 8}


@pytest.mark.parametrize(
    ("workers", "resources"),
    [
        (NOTHING, {"requests": {"cpu": "250m", "memory": "512Mi"}}),
        (
            {**NOTHING, **ON_GPUS},
            {"limits": {"nvidia.com/gpu": "8"}, "requests": {"cpu": "8", "memory": "32Gi"}},
        ),
        ({"resources": {"requests": {"cpu": None}}}, {"requests": {"memory": "1Gi"}}),
        ({"resources": {"requests": None, "limits": {"cpu": "2"}}}, {"limits": {"cpu": "2"}}),
        (
            {"resources": {"requests": {"cpu": None, "memory": None, "ephemeral-storage": "1Gi"}}},
            {"requests": {"ephemeral-storage": "1Gi", "cpu": "250m", "memory": "512Mi"}},
        ),
    ],
)
def test_no_pod_is_without_requests(workers, resources):
    assert pod_of(spec_of(workers=workers))["containers"][0]["resources"] == resources


@pytest.mark.parametrize(
    ("size", "method", "given", "kept"),
    [
        ("2B", "full", None, 10),
        ("51B", "full", None, 3),
        ("102B", "full", None, 2),
        ("102B", "full", 10, 10),
        ("102B", "lora", None, 10),
        ("custom", "full", None, 10),
    ],
)
def test_how_many_checkpoints_are_kept_follows_from_their_size(size, method, given, kept):
    methods = {"full": None, method: {}}
    wanted = {"everySteps": 7} if given is None else {"everySteps": 7, "keep": given}
    spec = spec_of(model={"size": size}, method=methods, checkpoint=wanted)
    found = train_job(OWNER, spec, 1).checkpoint
    assert (found.keep, found.every_steps, found.every_seconds) == (kept, 7, 1800)


def test_the_job_never_retries_by_itself():
    spec = training_job(plan_of(attempt=2, restarts=1))
    assert spec["metadata"]["name"] == "alpaca-2"
    config = config_name(plan_of(attempt=2, restarts=1))
    assert spec["metadata"]["annotations"] == {"yuan2.dev/restarts": "1", "yuan2.dev/config": config}
    assert spec["spec"]["backoffLimit"] == 0
    assert {rule["action"] for rule in spec["spec"]["podFailurePolicy"]["rules"]} == {"FailJob"}


def test_the_job_is_made_last():
    kinds = [manifest["kind"] for manifest in finetune_manifests(plan_of())]
    assert kinds == ["ConfigMap", "Service", "Job"]


@pytest.mark.parametrize(
    ("text", "amount"),
    [("500m", "0.5"), ("64Gi", str(64 * 1024**3)), ("1e3", "1000"), (4, "4"), ("2k", "2000")],
)
def test_quantities_are_numbers(text, amount):
    assert parse_quantity(text) == parse_quantity(amount)


@pytest.mark.parametrize("text", ["", "four", "4X", "Gi"])
def test_other_texts_are_no_quantities(text):
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(text)
