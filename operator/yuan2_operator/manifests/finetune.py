"""A plan of one attempt as Kubernetes objects: ConfigMap, headless Service, Indexed Job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from yuan2_core.contract import EXIT_INVALID, EXIT_PREEMPTED, PORT_PROGRESS, PORT_RENDEZVOUS, TERMINATION_LOG
from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.constants import (
    ANNOTATION_CONFIG,
    ANNOTATION_RESTARTS,
    COMPONENT_TRAINER,
    DATASET_DIRECTORY,
    EVALUATION_DIRECTORY,
    FIELD_MANAGER,
    LABEL_ATTEMPT,
    PROGRESS_PORT_NAME,
    RENDEZVOUS_PORT_NAME,
    SHARED_MEMORY_DIRECTORY,
    TRAINER_CONTAINER,
)
from yuan2_operator.manifests.avoidance import avoiding
from yuan2_operator.manifests.common import (
    Manifest,
    child_labels,
    claim_mounts,
    claim_volumes,
    config_map,
    container_security_context,
    image_fields,
    job_mount,
    job_volume,
    metadata,
    passthrough,
    placement,
    pod_security_context,
    pull_secrets,
    resources,
)
from yuan2_operator.manifests.pod_template import laid_over
from yuan2_operator.manifests.scheduling import pod_groups, scheduled
from yuan2_operator.plan.finetune import FineTunePlan, claims, config_name, job_name
from yuan2_operator.plan.owner import Owner, selector_labels

DATASET_VOLUME = "dataset"
EVALUATION_VOLUME = "evaluation"
SHARED_MEMORY_VOLUME = "shm"
TRAINER_COMMAND = ["python", "-m", "yuan2_trainer"]
NODE_LOSS_SECONDS = 60
"""A pod whose node does not answer is given up after this long, not after Kubernetes' 300 s: all ranks wait
for it."""
NODE_LOSS_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

KUBEFLOW_OPERATOR = "training.kubeflow.org/operator-name"
KUBEFLOW_JOB = "training.kubeflow.org/job-name"
KUBEFLOW_INDEX = "training.kubeflow.org/replica-index"
KUBEFLOW_TYPE = "training.kubeflow.org/replica-type"
KUBEFLOW_ROLE = "training.kubeflow.org/job-role"
INDEX_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def finetune_manifests(plan: FineTunePlan) -> list[Manifest]:
    """Every child of one attempt, in the order in which they are applied: the Job last, its pods need the
    rest."""
    labels = {LABEL_ATTEMPT: str(plan.attempt)}
    config = config_map(plan.owner, config_name(plan), COMPONENT_TRAINER, plan.job.to_json(), labels=labels)
    # What a run did is what its file says: nobody changes it afterwards.
    config["immutable"] = True
    return [config, network_service(plan.owner), *pod_groups(plan), training_job(plan)]


def network_service(owner: Owner) -> Manifest:
    """The headless Service that gives pods their names; a rank finds rank 0 before that one is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(owner, owner.name, COMPONENT_TRAINER),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector_labels(owner, COMPONENT_TRAINER),
            # Not the port of the progress: only rank 0 listens there, the others would be dead targets.
            "ports": [
                {"name": RENDEZVOUS_PORT_NAME, "port": PORT_RENDEZVOUS, "targetPort": RENDEZVOUS_PORT_NAME}
            ],
        },
    }


def training_job(plan: FineTunePlan) -> Manifest:
    """The Indexed Job: one pod a node rank, all of them or none, never retried by itself."""
    name = job_name(plan.owner.name, plan.attempt)
    labels = {LABEL_ATTEMPT: str(plan.attempt), **_kubeflow_labels(plan)}
    pods = plan.spec.workers.replicas
    template = {
        "metadata": {"labels": {**child_labels(plan.owner, COMPONENT_TRAINER), **labels}},
        "spec": _pod_spec(plan),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(
            plan.owner,
            name,
            COMPONENT_TRAINER,
            labels=labels,
            annotations={ANNOTATION_RESTARTS: str(plan.restarts), ANNOTATION_CONFIG: config_name(plan)},
        ),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": avoiding(
                laid_over(scheduled(plan, template), plan.spec.workers.pod_template),
                plan.avoid,
                required=plan.spec.run_policy.avoid_failed_nodes == "Required",
            ),
        },
    }


def _failure_rules() -> list[Manifest]:
    """What the Job names as the cause when pods that end together are gone before anybody looked at them."""
    codes = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": TRAINER_CONTAINER, "operator": "In", "values": [code]},
        }
        for code in (EXIT_INVALID, EXIT_PREEMPTED)
    ]
    disruption = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return [codes[0], disruption, codes[1]]


def _kubeflow_labels(plan: FineTunePlan) -> dict[str, str]:
    """The labels of a PyTorchJob's pod; those that differ from pod to pod only where there is one pod."""
    labels = {KUBEFLOW_OPERATOR: FIELD_MANAGER, KUBEFLOW_JOB: plan.owner.name}
    if plan.spec.workers.replicas == 1:
        labels |= {KUBEFLOW_TYPE: "master", KUBEFLOW_INDEX: "0", KUBEFLOW_ROLE: "master"}
    return labels


def _pod_spec(plan: FineTunePlan) -> Manifest:
    workers = plan.spec.workers
    placed = placement(workers)
    given = placed.get("tolerations", [])
    overlaid = workers.pod_template.spec.get("tolerations", []) if workers.pod_template is not None else []
    placed["tolerations"] = [*given, *_node_loss([*given, *overlaid])]
    return {
        "restartPolicy": "Never",
        "subdomain": plan.owner.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": plan.grace_seconds,
        "securityContext": pod_security_context(),
        **(
            {"imagePullSecrets": pull_secrets(workers.image_pull_secrets)}
            if workers.image_pull_secrets
            else {}
        ),
        "containers": [_container(plan)],
        "volumes": _volumes(plan),
        **placed,
    }


def _container(plan: FineTunePlan) -> Manifest:
    workers = plan.spec.workers
    asked = resources(workers.resources, workers.gpus_per_worker or 0, workers.gpu_resource)
    if plan.requests:
        asked = {**asked, "requests": {**asked.get("requests", {}), **plan.requests}}
    return {
        "name": TRAINER_CONTAINER,
        **image_fields(plan.image, workers.image_pull_policy),
        "command": TRAINER_COMMAND,
        "env": environment(plan),
        "ports": [
            {"name": RENDEZVOUS_PORT_NAME, "containerPort": PORT_RENDEZVOUS},
            {"name": PROGRESS_PORT_NAME, "containerPort": PORT_PROGRESS},
        ],
        **({"resources": asked} if asked else {}),
        # DeepSpeed and Triton keep caches and locks beside their compiled kernels, inside the image.
        "securityContext": {**container_security_context(), "readOnlyRootFilesystem": False},
        "terminationMessagePath": str(TERMINATION_LOG),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(plan),
    }


def environment(plan: FineTunePlan) -> list[Manifest]:
    """The environment of a PyTorchJob pod, then the user's variables."""
    launch = plan.job.launch
    master = f"{job_name(plan.owner.name, plan.attempt)}-0.{plan.owner.name}"
    values = {
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": master,
        "MASTER_PORT": str(PORT_RENDEZVOUS),
        "WORLD_SIZE": str(launch.nodes * launch.processes_per_node),
        "PET_MASTER_ADDR": master,
        "PET_MASTER_PORT": str(PORT_RENDEZVOUS),
        "PET_NPROC_PER_NODE": str(launch.processes_per_node),
        "PET_NNODES": str(launch.nodes),
    }
    given = [passthrough(variable) for variable in plan.spec.workers.env]
    if plan.threads is not None and all(variable["name"] != "OMP_NUM_THREADS" for variable in given):
        values["OMP_NUM_THREADS"] = str(plan.threads)
    plain = [{"name": name, "value": value} for name, value in values.items()]
    return [*plain, *map(_rank_variable, ("RANK", "PET_NODE_RANK")), *given]


def _rank_variable(name: str) -> Manifest:
    """The completion index of the pod: the node's rank."""
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": INDEX_FIELD}}}


def _node_loss(given: list[Manifest]) -> list[Manifest]:
    """Tolerations that make a dead node's pods go soon, for the taints that the user did not mention."""
    mentioned = {toleration.get("key") for toleration in given}
    if None in mentioned:
        return []
    return [
        {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOSS_SECONDS}
        for taint in NODE_LOSS_TAINTS
        if taint not in mentioned
    ]


def _volumes(plan: FineTunePlan) -> list[Manifest]:
    spec = plan.spec
    shared = {"medium": "Memory", "sizeLimit": spec.workers.shared_memory}
    volumes = [
        job_volume(config_name(plan)),
        {"name": SHARED_MEMORY_VOLUME, "emptyDir": shared},
        *claim_volumes(claims(spec)),
    ]
    volumes += [{"name": name, "configMap": {"name": config}} for name, config, _ in _config_maps(spec)]
    return volumes


def _mounts(plan: FineTunePlan) -> list[Manifest]:
    spec = plan.spec
    mounts = [
        job_mount(),
        {"name": SHARED_MEMORY_VOLUME, "mountPath": str(SHARED_MEMORY_DIRECTORY)},
        *claim_mounts(claims(spec), writable={spec.output.persistent_volume_claim.claim_name}),
    ]
    mounts += [
        {"name": name, "mountPath": str(place), "readOnly": True} for name, _, place in _config_maps(spec)
    ]
    return mounts


def _config_maps(spec: FineTuneSpec) -> Iterator[tuple[str, str, PurePosixPath]]:
    """ConfigMaps with conversations: volume, name and where it is mounted."""
    data, held_out = spec.dataset.source.config_map, spec.dataset.eval_source
    if data is not None:
        yield DATASET_VOLUME, data.name, DATASET_DIRECTORY
    if held_out is not None and held_out.config_map is not None:
        yield EVALUATION_VOLUME, held_out.config_map.name, EVALUATION_DIRECTORY
