"""A Yuan2FineTune becomes the frozen plan of one attempt, or a reason why there is none. Pure.

A plan says what the pods are told (`TrainJob`) and what they need; `manifests.finetune` knows how that
looks in Kubernetes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Literal

from yuan2_core.conflicts import job_conflicts, method_name
from yuan2_core.contract import DatasetLocation, Launch, ModelLocation, TrainJob
from yuan2_core.presets import zero_stage
from yuan2_core.sections import Checkpoint
from yuan2_operator.api.common import ClaimPath
from yuan2_operator.api.finetune import DatasetSource, FineTuneSpec
from yuan2_operator.constants import CLAIMS_DIRECTORY, DATASET_DIRECTORY, EVALUATION_DIRECTORY, Reason
from yuan2_operator.plan.owner import Owner, digest
from yuan2_operator.plan.pod_template import OF_TRAINER, reject_template
from yuan2_operator.plan.quantity import parse_quantity
from yuan2_operator.plan.references import Missing, Reference, Rejection, reject_missing

GRACE_SECONDS = {"custom": 300, "2B": 180, "51B": 600, "102B": 900}
"""Time that a pod has between SIGTERM and SIGKILL to finish a step and write a checkpoint, by model size."""

KEPT_OF_FULL = {"51B": 3, "102B": 2}
"""Checkpoints that are kept of a run over all parameters: 12 bytes of each parameter."""
RENDEZVOUS_MARGIN_SECONDS = 600


@dataclass(frozen=True)
class FineTunePlan:
    """One attempt of a fine-tuning, fully decided."""

    owner: Owner
    spec: FineTuneSpec
    attempt: int
    restarts: int
    """Counted restarts so far."""
    image: str
    job: TrainJob
    grace_seconds: int
    requests: Mapping[str, str]
    """What a pod asks of its node beside GPUs when the user gave nothing: the kubelet evicts pods without
    requests first, which is no failure and so would repeat without end."""
    threads: int | None
    """OMP_NUM_THREADS of a process, as far as the CPUs asked for decide it."""
    avoid: tuple[str, ...] = ()
    """Nodes on which attempts have failed again and again."""


def job_name(name: str, attempt: int) -> str:
    """Name of the Job of an attempt; pod i is called `<that>-<i>` inside the network."""
    return f"{name}-{attempt}"


def config_name(plan: FineTunePlan) -> str:
    """Name of the ConfigMap with the job file of an attempt: another content has another name, so that a Job
    that names it runs what its plan says, whatever an earlier try has left."""
    return f"{job_name(plan.owner.name, plan.attempt)}-{digest(plan.job.to_json())[:8]}"


def references(spec: FineTuneSpec) -> tuple[Reference, ...]:
    """What must exist: the claims, the ConfigMaps of the data, the registry's Secrets."""
    found = [_claim(spec.model.source.persistent_volume_claim, "spec.model.source")]
    for field, source in _sources(spec):
        if source.persistent_volume_claim is not None:
            found.append(_claim(source.persistent_volume_claim, field))
        if source.config_map is not None:
            found.append(Reference("ConfigMap", source.config_map.name, field, source.config_map.key))
    found.append(_claim(spec.output.persistent_volume_claim, "spec.output"))
    found += [
        Reference("Secret", secret.name, "spec.workers.imagePullSecrets")
        for secret in spec.workers.image_pull_secrets
    ]
    return tuple(found)


def plan_finetune(
    owner: Owner,
    spec: FineTuneSpec,
    *,
    attempt: int,
    restarts: int,
    missing: Collection[Missing],
    default_image: str,
    privileges: Collection[str] = (),
    avoid: tuple[str, ...] = (),
) -> FineTunePlan | Rejection:
    """Decide what attempt number `attempt` is; `missing` are those of `references` that are not there,
    `privileges` what the administrator allows pods, `avoid` nodes on which attempts have failed."""
    template, field = spec.workers.pod_template, "spec.workers.podTemplate"
    refused = reject_template(template, field, OF_TRAINER, owner.namespace, privileges)
    if refused is not None:
        return refused
    job = train_job(owner, spec, attempt)
    for conflict in job_conflicts(job):
        return Rejection(Reason.INVALID_SPEC, conflict)
    rejection = reject_missing(owner.namespace, references(spec), missing)
    if rejection is not None:
        return rejection
    image = spec.workers.image or default_image
    if not image:
        text = "no trainer image: set spec.workers.image, or YUAN2_TRAIN_IMAGE in the operator's settings"
        return Rejection(Reason.IMAGE_NOT_SET, text)
    return FineTunePlan(
        owner=owner,
        spec=spec,
        attempt=attempt,
        restarts=restarts,
        image=image,
        job=job,
        grace_seconds=spec.workers.termination_grace_period_seconds or GRACE_SECONDS[spec.model.size],
        requests=requests(spec),
        threads=_threads(spec),
        avoid=() if spec.run_policy.avoid_failed_nodes == "Never" else avoid,
    )


def requests(spec: FineTuneSpec) -> dict[str, str]:
    """CPU and memory for a pod that was given neither; empty for others."""
    given = {*spec.workers.resources.requests, *spec.workers.resources.limits}
    if given & {"cpu", "memory"}:
        return {}
    count, on_gpus = processes(spec), spec.workers.gpus_per_worker is not None
    return {
        "cpu": str(count) if on_gpus else f"{250 * count}m",
        "memory": f"{4 * count}Gi" if on_gpus else f"{512 * count}Mi",
    }


def checkpoint(spec: FineTuneSpec) -> Checkpoint:
    """The section with the number of checkpoints to keep, which the size decides where the user did not."""
    if "keep" in spec.checkpoint.model_fields_set or spec.method.full is None:
        return spec.checkpoint
    return spec.checkpoint.model_copy(
        update={"keep": KEPT_OF_FULL.get(spec.model.size, spec.checkpoint.keep)}
    )


def train_job(owner: Owner, spec: FineTuneSpec, attempt: int) -> TrainJob:
    """The one file of the pods."""
    held_out = spec.dataset.eval_source
    return TrainJob(
        name=owner.name,
        namespace=owner.namespace,
        uid=owner.uid,
        attempt=attempt,
        model=ModelLocation(size=spec.model.size, path=_path_of(spec.model.source.persistent_volume_claim)),
        dataset=DatasetLocation(
            path=_path_in(spec.dataset.source, DATASET_DIRECTORY),
            format=spec.dataset.format,
            files=spec.dataset.files,
            max_invalid_fraction=spec.dataset.max_invalid_fraction,
            eval_path=_path_in(held_out, EVALUATION_DIRECTORY) if held_out is not None else None,
            eval_fraction=spec.dataset.eval_fraction,
        ),
        method=spec.method,
        objective=spec.objective,
        training=spec.training,
        stage=stage(spec),
        deepspeed=spec.deepspeed,
        checkpoint=checkpoint(spec),
        evaluation=spec.evaluation,
        output=_path_of(spec.output.persistent_volume_claim),
        merge_adapter=spec.output.merge_adapter,
        tensorboard=spec.output.tensorboard,
        launch=launch(spec),
    )


def launch(spec: FineTuneSpec) -> Launch:
    """The processes of an attempt."""
    return Launch(
        nodes=spec.workers.replicas,
        processes_per_node=processes(spec),
        device="cpu" if spec.workers.gpus_per_worker is None else "cuda",
        # The operator ends the wait; the pods would only if there were no operator.
        rendezvous_seconds=spec.run_policy.start_timeout_seconds + RENDEZVOUS_MARGIN_SECONDS,
    )


def stage(spec: FineTuneSpec) -> Literal[0, 2, 3]:
    """The ZeRO stage: the user's, else the published recipe's for size and method."""
    if spec.deepspeed.stage is not None:
        return spec.deepspeed.stage
    return zero_stage(spec.model.size, method_name(spec.method) or "full")


def processes(spec: FineTuneSpec) -> int:
    """Processes of a pod; the CRD holds that one of the two fields is there."""
    given = spec.workers.gpus_per_worker or spec.workers.processes_per_worker
    if given is None:
        raise ValueError("spec.workers: give gpusPerWorker, or processesPerWorker to train on CPU")
    return given


def summary(spec: FineTuneSpec) -> str:
    """The plan in a few words: `plan: 2 pods × 8 GPUs, ZeRO-3`."""
    workers = spec.workers
    unit = "GPU" if workers.gpus_per_worker is not None else "CPU process"
    per_pod = processes(spec)
    plural = ("es" if unit.endswith("s") else "s") if per_pod != 1 else ""
    pods = f"{workers.replicas} pod" + ("s" if workers.replicas != 1 else "")
    zero = f"ZeRO-{stage(spec)}" if stage(spec) else "no ZeRO"
    return f"plan: {pods} × {per_pod} {unit}{plural}, {zero}"


def claims(spec: FineTuneSpec) -> tuple[str, ...]:
    """The distinct claims of the pods."""
    named = [spec.model.source.persistent_volume_claim, spec.output.persistent_volume_claim]
    named += [claim for _, source in _sources(spec) if (claim := source.persistent_volume_claim) is not None]
    return tuple(sorted({claim.claim_name for claim in named}))


def _sources(spec: FineTuneSpec) -> Iterator[tuple[str, DatasetSource]]:
    """Where conversations are, with the field that says so."""
    yield "spec.dataset.source", spec.dataset.source
    if spec.dataset.eval_source is not None:
        yield "spec.dataset.evalSource", spec.dataset.eval_source


def _claim(place: ClaimPath, field: str) -> Reference:
    return Reference("PersistentVolumeClaim", place.claim_name, field)


def _path_of(place: ClaimPath) -> str:
    return str(CLAIMS_DIRECTORY / place.claim_name / place.path)


def _path_in(source: DatasetSource, config_maps: PurePosixPath) -> str:
    """The file as the pod sees it; a ConfigMap is mounted at `config_maps`."""
    if source.config_map is not None:
        return str(config_maps / source.config_map.key)
    if source.persistent_volume_claim is None:
        raise ValueError("spec.dataset.source: name exactly one of persistentVolumeClaim and configMap")
    return _path_of(source.persistent_volume_claim)


def _threads(spec: FineTuneSpec) -> int | None:
    """The pod's CPUs shared among its processes: a request alone is invisible inside the pod."""
    resources = spec.workers.resources
    cpu = resources.limits.get("cpu") or resources.requests.get("cpu")
    if cpu is None:
        return None
    return max(1, int(parse_quantity(cpu) // Decimal(processes(spec))))
