"""A Yuan2Service and what it refers to become a frozen plan, or a reason why there is none.

Pure. A plan says what each pod is told (`ServeJob`) and which model it serves; `manifests.service` knows how
that looks in Kubernetes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from yuan2_core.contract import PORT_CONTROLLER, PORT_WORKER, ApiJob, ServeJob, WorkerJob
from yuan2_core.engine import VllmOptions
from yuan2_operator.api.common import ModelPlace
from yuan2_operator.api.finetune import FineTuneStatus
from yuan2_operator.api.service import Placement, ServedModel, ServiceSpec, ServiceStatus, ServiceWorker
from yuan2_operator.constants import (
    ANNOTATION_CONFIG_HASH,
    ANNOTATION_MODEL_FINGERPRINT,
    CLAIMS_DIRECTORY,
    COMPONENT_API,
    COMPONENT_CONTROLLER,
    COMPONENT_WEB,
    COMPONENT_WORKER,
    CONDITION_FAILED,
    Reason,
)
from yuan2_operator.plan.owner import Owner, digest, label_selector, selector_labels
from yuan2_operator.plan.pod_template import of_component, reject_template
from yuan2_operator.plan.references import Missing, Reference, Rejection, reject_missing


@dataclass(frozen=True)
class ServicePlan:
    """What the pods of a service are, fully decided."""

    owner: Owner
    spec: ServiceSpec
    image: str
    worker_image: str
    model: ServedModel
    job: ServeJob
    note: str
    """What there is to know about the model, for `Accepted`'s sentence."""


def component_name(service: str, component: str) -> str:
    """Name of the Deployment and the Service of a component."""
    return f"{service}-{component}"


def config_name(plan: ServicePlan, component: str) -> str:
    """Name of the ConfigMap with a component's job.json: another content has another name, so that pods of an
    earlier revision, which a rollout may have to start again, find theirs."""
    return f"{component_name(plan.owner.name, component)}-{digest(*_told(plan.job, component))[:8]}"


def components(spec: ServiceSpec) -> tuple[str, ...]:
    """The components of a service, in the order in which they are made."""
    always = (COMPONENT_CONTROLLER, COMPONENT_WORKER, COMPONENT_API)
    return (*always, COMPONENT_WEB) if spec.web.enabled else always


def placements(spec: ServiceSpec) -> dict[str, Placement]:
    """What the user says of the pods of each component."""
    return {
        COMPONENT_CONTROLLER: spec.controller,
        COMPONENT_WORKER: spec.worker,
        COMPONENT_API: spec.api,
        COMPONENT_WEB: spec.web,
    }


def controller_url(owner: Owner) -> str:
    """Where the pods of a service find FastChat's controller."""
    return (
        f"http://{component_name(owner.name, COMPONENT_CONTROLLER)}.{owner.namespace}.svc:{PORT_CONTROLLER}"
    )


def public_url(owner: Owner, spec: ServiceSpec) -> str:
    """What a client inside the cluster takes as OpenAI's base URL."""
    return f"http://{component_name(owner.name, COMPONENT_API)}.{owner.namespace}.svc:{spec.api.port}/v1"


def served_model(
    spec: ServiceSpec, prior: ServiceStatus, finetune: FineTuneStatus | None
) -> ServedModel | None:
    """The model to serve, or None while the FineTune has none yet.

    A FineTune that is deleted or runs again does not take its earlier model away: that one is served on, and
    replaced when the new run is complete.
    """
    if spec.model.source is not None:
        place = spec.model.source.persistent_volume_claim
        return ServedModel(claim_name=place.claim_name, path=place.path)
    name = _fine_tune_name(spec)
    if finetune is not None and finetune.model is not None:
        return ServedModel.model_validate({**finetune.model.model_dump(), "fine_tune": name})
    return prior.model if prior.model is not None and prior.model.fine_tune == name else None


def references(spec: ServiceSpec, model: ServedModel | None) -> tuple[Reference, ...]:
    """What must exist: the claims of the model and its adapter, and the Secret of the keys."""
    found: list[Reference] = []
    if model is not None:
        field = (
            "spec.model.source" if model.fine_tune is None else f"spec.model.fineTuneRef {model.fine_tune}"
        )
        found += [Reference("PersistentVolumeClaim", claim, field) for claim in claims(model)]
    for adapter in spec.model.adapters:
        claim = adapter.source.persistent_volume_claim.claim_name
        found.append(Reference("PersistentVolumeClaim", claim, f"spec.model.adapters {adapter.name}"))
    if spec.api.keys_secret is not None:
        found.append(Reference("Secret", spec.api.keys_secret.name, "spec.api.keysSecret"))
    return tuple(found)


def claims(model: ServedModel, spec: ServiceSpec | None = None) -> tuple[str, ...]:
    """The distinct claims that hold a model and, with its `spec`, the adapters beside it."""
    named = [model.claim_name, *([model.adapter.claim_name] if model.adapter is not None else [])]
    beside = [] if spec is None else spec.model.adapters
    named += [adapter.source.persistent_volume_claim.claim_name for adapter in beside]
    return tuple(dict.fromkeys(named))


def plan_service(
    owner: Owner,
    spec: ServiceSpec,
    prior: ServiceStatus,
    *,
    finetune: FineTuneStatus | None,
    missing: Collection[Missing],
    default_image: str,
    default_vllm_image: str = "",
    privileges: Collection[str] = (),
) -> ServicePlan | Rejection:
    """Decide what to serve.

    `finetune` is the status of the FineTune that `spec.model.fineTuneRef` names, None when it does not exist;
    `missing` are those of `references` that do not exist; the default images are those of the operator's
    settings; `privileges` is what the administrator allows.
    """
    for component, placed in placements(spec).items():
        field, owned = f"spec.{component}.podTemplate", of_component(component)
        refused = reject_template(placed.pod_template, field, owned, owner.namespace, privileges)
        if refused is not None:
            return refused
    model = served_model(spec, prior, finetune)
    if model is None:
        return _no_model(owner, _fine_tune_name(spec), finetune)
    rejection = reject_missing(owner.namespace, references(spec, model), missing)
    if rejection is not None:
        return rejection
    image = spec.image or default_image
    if not image:
        message = "no server image: set spec.image, or YUAN2_SERVE_IMAGE in the operator's settings"
        return Rejection(Reason.IMAGE_NOT_SET, message)
    fallback = default_vllm_image if uses_vllm(spec.worker) else default_image
    worker_image = spec.worker.image or spec.image or fallback
    if not worker_image:
        message = (
            "no image with vLLM: set spec.worker.image, or YUAN2_SERVE_VLLM_IMAGE in the operator's "
            "settings, or spec.worker.engine: builtin"
        )
        return Rejection(Reason.IMAGE_NOT_SET, message)
    job = _job(owner, spec, model)
    return ServicePlan(owner, spec, image, worker_image, model, job, _note(model, finetune))


def uses_vllm(worker: ServiceWorker) -> bool:
    """Whether vLLM computes the answers, and not the built-in engine."""
    return worker.engine == "vllm" or (worker.engine == "auto" and worker.gpus_per_worker > 0)


def worker_selector(owner: Owner) -> str:
    """Selector of the worker pods, as the scale subresource reports it."""
    return label_selector(selector_labels(owner, COMPONENT_WORKER))


def revision(plan: ServicePlan, component: str) -> dict[str, str]:
    """Annotations of a pod template: pods are replaced when what they are told, or the model, is another."""
    annotations = {ANNOTATION_CONFIG_HASH: digest(*_told(plan.job, component))}
    if component == COMPONENT_WORKER:
        annotations[ANNOTATION_MODEL_FINGERPRINT] = plan.model.fingerprint
    return annotations


def _fine_tune_name(spec: ServiceSpec) -> str:
    """Name of the FineTune; the CRD holds that it is there when `source` is not."""
    if spec.model.fine_tune_ref is None:
        raise ValueError("spec.model: name exactly one of fineTuneRef and source")
    return spec.model.fine_tune_ref.name


def _no_model(owner: Owner, name: str, finetune: FineTuneStatus | None) -> Rejection:
    if finetune is None:
        message = (
            f"Yuan2FineTune {name} does not exist in namespace {owner.namespace}: "
            "create it, or correct spec.model.fineTuneRef; it is picked up when it appears"
        )
        return Rejection(Reason.FINETUNE_NOT_FOUND, message)
    if finetune.phase == "Failed":
        cause = next((c.message for c in finetune.conditions if c.type == CONDITION_FAILED), "")
        message = f"Yuan2FineTune {name} failed and left no model" + (f": {cause}" if cause else "")
        return Rejection(Reason.FINETUNE_FAILED, message)
    state = finetune.phase or "Pending"
    progress = f" at step {finetune.progress}" if finetune.progress else ""
    eta = f", {finetune.eta} left" if finetune.eta else ""
    message = (
        f"Yuan2FineTune {name} is {state}{progress}{eta}: the service starts by itself when it is Complete"
    )
    return Rejection(Reason.FINETUNE_NOT_COMPLETE, message)


def _job(owner: Owner, spec: ServiceSpec, model: ServedModel) -> ServeJob:
    url = controller_url(owner)
    worker = WorkerJob(
        port=PORT_WORKER,
        controller_url=url,
        device="cuda" if spec.worker.gpus_per_worker else "cpu",
        gpus=spec.worker.gpus_per_worker,
        precision=spec.worker.precision,
        vllm=_vllm(spec) if uses_vllm(spec.worker) else None,
        max_model_length=spec.worker.max_model_length,
        max_concurrent_requests=spec.worker.max_concurrent_requests,
    )
    api = ApiJob(
        port=spec.api.port,
        controller_url=url,
        require_key=spec.api.keys_secret is not None,
        max_choices=spec.worker.max_concurrent_requests,
        cors_origins=tuple(spec.api.cors_origins),
    )
    return ServeJob(
        name=owner.name,
        namespace=owner.namespace,
        uid=owner.uid,
        served_name=spec.model.name,
        aliases=tuple(spec.model.aliases),
        model_path=_path_of(model),
        adapter_path=_path_of(model.adapter) if model.adapter is not None else None,
        worker=worker,
        api=api,
    )


def _vllm(spec: ServiceSpec) -> VllmOptions:
    worker = spec.worker
    places = {adapter.name: adapter.source.persistent_volume_claim for adapter in spec.model.adapters}
    return VllmOptions(
        gpu_memory_utilization=worker.gpu_memory_utilization,
        quantization=worker.quantization,
        prefix_caching=worker.prefix_caching is not False,
        adapters={name: _directory(place.claim_name, place.path) for name, place in places.items()},
        engine_args=worker.engine_args,
    )


def _path_of(place: ModelPlace) -> str:
    return _directory(place.claim_name, place.path)


def _directory(claim: str, path: str) -> str:
    return str(CLAIMS_DIRECTORY / claim / path)


def _note(model: ServedModel, finetune: FineTuneStatus | None) -> str:
    place = f"{model.path} of claim {model.claim_name}"
    if model.fine_tune is None:
        return place
    if model.adapter is not None:
        place += f" with adapter {model.adapter.path} of claim {model.adapter.claim_name}"
    if finetune is None:
        return f"{place}, made by Yuan2FineTune {model.fine_tune}, which does not exist any more"
    if finetune.model is None:
        return f"{place}, of an earlier run of Yuan2FineTune {model.fine_tune}; the new one replaces it"
    return f"{place}, made by Yuan2FineTune {model.fine_tune}"


def _told(job: ServeJob, component: str) -> tuple[str, ...]:
    """The part of the job that a component acts on; the rest may change without replacing its pods.

    What has its default is left out: a field that a later operator adds replaces no pod.
    """
    names = job.names
    if component == COMPONENT_WORKER:
        model = (job.model_path, *([job.adapter_path] if job.adapter_path is not None else []))
        return (*names, *model, _changed(job.worker))
    return (*names, _changed(job.api)) if component == COMPONENT_API else ()


def _changed(part: WorkerJob | ApiJob) -> str:
    return part.model_dump_json(by_alias=True, exclude_defaults=True)
