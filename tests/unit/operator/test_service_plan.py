"""What a Yuan2Service and the things it names become."""

from __future__ import annotations

import json

import pytest

from tests.support.services import IMAGE, OWNER, SOURCE, VLLM_IMAGE, finetune_of, manifest, plan_of, spec_of
from yuan2_core.contract import ServeJob
from yuan2_core.engine import VllmOptions
from yuan2_operator.api.service import ServedModel, ServiceStatus
from yuan2_operator.plan.references import Missing, Reference, Rejection
from yuan2_operator.plan.service import (
    _told,
    config_name,
    plan_service,
    public_url,
    references,
    revision,
    served_model,
)

BY_REF = {"name": "yuan2", "fineTuneRef": {"name": "tuned"}}


def reject(spec, prior=None, **changes) -> Rejection:
    arguments = {"finetune": None, "missing": (), "default_image": IMAGE, **changes}
    decision = plan_service(OWNER, spec, prior or ServiceStatus(), **arguments)
    assert isinstance(decision, Rejection)
    return decision


def test_a_directory_of_a_claim_is_served_from_its_mount():
    plan = plan_of()
    assert plan.job.model_path == "/mnt/claims/models/yuan2-2b"
    assert plan.model == ServedModel(claim_name="models", path="yuan2-2b")
    assert plan.note == "yuan2-2b of claim models"


def test_the_root_of_a_claim_is_a_path_too():
    source = {"persistentVolumeClaim": {"claimName": "models", "path": "."}}
    assert plan_of(spec_of(model={"name": "m", "source": source})).job.model_path == "/mnt/claims/models"


def test_the_job_file_reads_back_equal():
    job = plan_of(spec_of(api={"keysSecret": {"name": "keys"}, "port": 9000})).job
    assert ServeJob.model_validate_json(job.to_json()) == job
    assert (job.api.require_key, job.api.port) == (True, 9000)
    assert job.worker.controller_url == "http://alpaca-controller.demo.svc:8503"


@pytest.mark.parametrize(
    ("worker", "engine", "image"),
    [
        ({}, "builtin", IMAGE),
        ({"gpusPerWorker": 1}, "vllm", VLLM_IMAGE),
        ({"gpusPerWorker": 1, "engine": "builtin"}, "builtin", IMAGE),
        ({"engine": "vllm"}, "vllm", VLLM_IMAGE),
        ({"engine": "vllm", "image": "mine:1"}, "vllm", "mine:1"),
        ({"image": "mine:1"}, "builtin", "mine:1"),
    ],
)
def test_the_engine_follows_from_the_gpus_unless_it_is_named(worker, engine, image):
    plan = plan_of(spec_of(worker=worker))
    found = "builtin" if plan.job.worker.vllm is None else "vllm"
    assert (found, plan.worker_image, plan.image) == (engine, image, IMAGE)


def test_the_image_of_a_service_is_that_of_its_workers_too():
    plan = plan_of(spec_of(image="all:1", worker={"engine": "vllm"}))
    assert (plan.image, plan.worker_image) == ("all:1", "all:1")


def test_without_an_image_that_has_vllm_there_is_no_plan():
    rejection = reject(spec_of(worker={"gpusPerWorker": 1}))
    assert rejection.reason == "ImageNotSet"
    assert rejection.message == (
        "no image with vLLM: set spec.worker.image, or YUAN2_SERVE_VLLM_IMAGE in the operator's settings, or "
        "spec.worker.engine: builtin"
    )


def test_what_only_vllm_has_is_told_to_it():
    worker = {
        "engine": "vllm",
        "gpusPerWorker": 4,
        "gpuMemoryUtilization": 0.8,
        "quantization": "fp8",
        "prefixCaching": False,
        "engineArgs": {"block-size": "32"},
    }
    job = plan_of(spec_of(worker=worker)).job.worker
    assert (job.gpus, job.device) == (4, "cuda")
    assert job.vllm == VllmOptions(
        gpu_memory_utilization=0.8, quantization="fp8", prefix_caching=False, engine_args={"block-size": "32"}
    )


def test_adapters_are_told_to_vllm_and_their_claims_must_exist():
    adapter = {
        "name": "terse",
        "source": {"persistentVolumeClaim": {"claimName": "tuned", "path": "a/adapter"}},
    }
    spec = spec_of(
        model={"name": "yuan2", "source": SOURCE, "adapters": [adapter]}, worker={"engine": "vllm"}
    )
    plan = plan_of(spec)
    assert plan.job.worker.vllm.adapters == {"terse": "/mnt/claims/tuned/a/adapter"}
    assert plan.job.names == ("yuan2", "terse")
    assert Reference("PersistentVolumeClaim", "tuned", "spec.model.adapters terse") in references(
        spec, plan.model
    )
    worker = manifest(plan, "Deployment", "alpaca-worker")["spec"]["template"]["spec"]
    mounts = [mount["mountPath"] for mount in worker["containers"][0]["volumeMounts"]]
    assert "/mnt/claims/tuned" in mounts
    assert revision(plan, "worker") != revision(plan_of(spec_of(worker={"engine": "vllm"})), "worker")


def test_pods_of_an_earlier_operator_are_not_replaced():
    """They are told no word of vLLM, as before there were two engines, and an older image reads their job."""
    assert "vllm" not in plan_of().job.to_json()


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_the_device_follows_from_the_gpus(gpus, device):
    job = plan_of(spec_of(worker={"gpusPerWorker": gpus})).job
    assert (job.worker.device, job.worker.gpus) == (device, gpus)


def test_a_complete_finetune_is_served_from_where_its_status_says():
    plan = plan_of(spec_of(model=BY_REF), finetune=finetune_of())
    assert plan.job.model_path == "/mnt/claims/outputs/alpaca/model"
    assert (plan.model.fine_tune, plan.model.fingerprint) == ("tuned", "run-1")


WITH_ADAPTER = {
    "claimName": "models",
    "path": "yuan2-51b",
    "adapter": {"claimName": "outputs", "path": "support/adapter"},
    "fingerprint": "run-1",
}


def test_an_adapter_is_served_with_the_model_it_was_trained_on():
    finetune = finetune_of(model=WITH_ADAPTER)
    plan = plan_of(spec_of(model=BY_REF), finetune=finetune)
    assert plan.job.model_path == "/mnt/claims/models/yuan2-51b"
    assert plan.job.adapter_path == "/mnt/claims/outputs/support/adapter"
    assert plan.note == (
        "yuan2-51b of claim models with adapter support/adapter of claim outputs, made by Yuan2FineTune tuned"
    )
    assert ServeJob.model_validate_json(plan.job.to_json()) == plan.job
    needed = {reference.name: reference.field for reference in references(plan.spec, plan.model)}
    assert needed == dict.fromkeys(["models", "outputs"], "spec.model.fineTuneRef tuned")
    pod = manifest(plan, "Deployment", "alpaca-worker")["spec"]["template"]["spec"]
    mounts = {m["mountPath"]: m.get("readOnly") for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["/mnt/claims/models"] is mounts["/mnt/claims/outputs"] is True


def test_a_claim_that_holds_model_and_adapter_is_mounted_once():
    model = {**WITH_ADAPTER, "adapter": {"claimName": "models", "path": "support/adapter"}}
    plan = plan_of(spec_of(model=BY_REF), finetune=finetune_of(model=model))
    pod = manifest(plan, "Deployment", "alpaca-worker")["spec"]["template"]["spec"]
    volumes = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in volumes] == ["models"]


def test_an_adapter_that_came_or_went_replaces_the_workers():
    spec = spec_of(model=BY_REF)
    plain = {key: value for key, value in WITH_ADAPTER.items() if key != "adapter"}
    before, after = (plan_of(spec, finetune=finetune_of(model=model)) for model in (plain, WITH_ADAPTER))
    assert revision(before, "worker") != revision(after, "worker")
    assert revision(before, "api") == revision(after, "api")


def test_the_missing_claim_of_an_adapter_is_named():
    spec, finetune = spec_of(model=BY_REF), finetune_of(model=WITH_ADAPTER)
    wanted = references(spec, served_model(spec, ServiceStatus(), finetune))
    refused = reject(spec, finetune=finetune, missing=[Missing(r) for r in wanted if r.name == "outputs"])
    assert refused.message.startswith("PersistentVolumeClaim outputs, named by spec.model.fineTuneRef tuned")


def test_a_finetune_that_does_not_exist_is_named():
    rejection = reject(spec_of(model=BY_REF))
    assert rejection.reason == "FineTuneNotFound"
    assert "Yuan2FineTune tuned does not exist in namespace demo" in rejection.message


def test_a_finetune_that_runs_is_waited_for_with_its_progress():
    running = finetune_of(phase="Running", model=None, progress="840/3621", eta="58m")
    rejection = reject(spec_of(model=BY_REF), finetune=running)
    assert rejection.reason == "FineTuneNotComplete"
    assert "is Running at step 840/3621, 58m left" in rejection.message


def test_a_finetune_that_failed_passes_its_cause_on():
    cause = {
        "type": "Failed",
        "status": "True",
        "reason": "InvalidData",
        "message": "record 7 has no answer",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    failed = finetune_of(phase="Failed", model=None, conditions=[cause])
    rejection = reject(spec_of(model=BY_REF), finetune=failed)
    assert rejection.reason == "FineTuneFailed"
    assert "record 7 has no answer" in rejection.message


@pytest.mark.parametrize("finetune", [None, finetune_of(phase="Running", model=None)])
def test_an_earlier_model_is_served_on_while_its_finetune_is_gone_or_runs_again(finetune):
    spec = spec_of(model=BY_REF)
    prior = ServiceStatus(model=plan_of(spec, finetune=finetune_of()).model)
    assert served_model(spec, prior, finetune) == prior.model


def test_the_earlier_model_of_another_finetune_is_not_served():
    prior = ServiceStatus(model=ServedModel(claim_name="c", path="p", fine_tune="another"))
    assert reject(spec_of(model=BY_REF), prior).reason == "FineTuneNotFound"


@pytest.mark.parametrize(
    ("kind", "reason"), [("PersistentVolumeClaim", "ClaimNotFound"), ("Secret", "SecretNotFound")]
)
def test_what_is_missing_is_named_with_the_field_that_names_it(kind, reason):
    spec = spec_of(api={"keysSecret": {"name": "keys"}})
    wanted = {r.kind: r for r in references(spec, served_model(spec, ServiceStatus(), None))}
    rejection = reject(spec, missing=[Missing(wanted[kind])])
    assert rejection.reason == reason
    named = f"{kind} {wanted[kind].name}, named by {wanted[kind].field}, does not exist in namespace demo: "
    assert rejection.message.startswith(named)
    assert "picked up when it appears" in rejection.message


def test_without_a_secret_of_keys_only_the_claim_is_needed():
    spec = spec_of()
    needed = references(spec, served_model(spec, ServiceStatus(), None))
    assert needed == (Reference("PersistentVolumeClaim", "models", "spec.model.source"),)


def test_an_image_comes_from_the_spec_then_from_the_settings():
    assert plan_of(spec_of(image="mine:1")).image == "mine:1"
    assert plan_of().image == IMAGE
    refused = reject(spec_of(), default_image="")
    assert refused.reason == "ImageNotSet"
    assert refused.message == (
        "no server image: set spec.image, or YUAN2_SERVE_IMAGE in the operator's settings"
    )


def test_the_public_url_follows_the_port():
    assert public_url(OWNER, spec_of(api={"port": 9000})) == "http://alpaca-api.demo.svc:9000/v1"


def test_a_changed_setting_replaces_only_the_pods_that_it_concerns():
    before, after = plan_of(), plan_of(spec_of(worker={"precision": "fp32"}))
    assert revision(before, "worker") != revision(after, "worker")
    assert revision(before, "api") == revision(after, "api")
    assert revision(before, "controller") == revision(after, "controller")
    assert config_name(before, "worker") != config_name(after, "worker")
    assert config_name(before, "api") == config_name(after, "api")


def test_a_field_that_a_later_operator_adds_replaces_no_pod():
    """Its default says nothing new: only what differs from the defaults counts."""
    job = plan_of().job
    told = json.loads(_told(job, "worker")[-1])
    assert "maxConcurrentRequests" not in told
    assert (
        json.loads(_told(plan_of(spec_of(worker={"maxConcurrentRequests": 2})).job, "worker")[-1])[
            "maxConcurrentRequests"
        ]
        == 2
    )


def test_pods_are_told_the_aliases_and_the_limits_of_a_request():
    model = {"name": "yuan2", "aliases": ["gpt-3.5-turbo"], "source": SOURCE}
    api = {"corsOrigins": ["https://app.example"]}
    job = plan_of(spec_of(model=model, worker={"maxConcurrentRequests": 2}, api=api)).job
    assert job.aliases == ("gpt-3.5-turbo",)
    assert (job.api.max_choices, job.api.cors_origins) == (2, ("https://app.example",))


def test_another_run_of_the_same_finetune_replaces_the_workers():
    spec = spec_of(model=BY_REF)
    again = {"claimName": "outputs", "path": "alpaca/model", "fingerprint": "run-2"}
    before, after = plan_of(spec, finetune=finetune_of()), plan_of(spec, finetune=finetune_of(model=again))
    assert revision(before, "worker") != revision(after, "worker")
    assert revision(before, "api") == revision(after, "api")
