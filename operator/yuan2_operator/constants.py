"""Names that stand in more than one place: the API group, labels, annotations, mounts, reasons.

Everything here is part of the project's face: a label or reason that changes breaks a selector or an alert.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

GROUP: Final = "yuan2.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
CATEGORY: Final = "yuan2"

KIND_FINETUNE: Final = "Yuan2FineTune"
KIND_SERVICE: Final = "Yuan2Service"
PLURAL_FINETUNE: Final = "yuan2finetunes"
PLURAL_SERVICE: Final = "yuan2services"
SHORT_FINETUNE: Final = "y2ft"
SHORT_SERVICE: Final = "y2svc"

FIELD_MANAGER: Final = "yuan2-operator"
"""Owner of the fields that server-side apply writes, and reporting component of events."""

NAME_LIMIT: Final = 40
"""Longest name of a resource: `<name>-<attempt>-<index>` and `<name>-controller` must fit a DNS label."""

# --- labels and annotations of children ---------------------------------------------------------------------

LABEL_FINETUNE: Final = "yuan2.dev/finetune"
"""Name of the Yuan2FineTune a child belongs to."""
LABEL_SERVICE: Final = "yuan2.dev/service"
"""Name of the Yuan2Service a child belongs to."""
LABEL_ATTEMPT: Final = "yuan2.dev/attempt"
"""Number of the attempt, on its Job, ConfigMap and pods."""
LABEL_COMPONENT: Final = "yuan2.dev/component"
"""Part a child plays: one of the `COMPONENT_*` values."""
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_PART_OF: Final = "app.kubernetes.io/part-of"
LABEL_NAME: Final = "app.kubernetes.io/name"
LABEL_INSTANCE: Final = "app.kubernetes.io/instance"
PART_OF: Final = "yuan2"

ANNOTATION_APPLIED_HASH: Final = "yuan2.dev/applied-hash"
"""On a child: hash of what was applied, by which a field that is no longer wanted is noticed."""
ANNOTATION_CONFIG_HASH: Final = "yuan2.dev/config-hash"
"""On a pod template: hash of the job file, so that a changed job rolls the pods."""
ANNOTATION_CONFIG: Final = "yuan2.dev/config"
"""On a Job: the ConfigMap with its job file, whose name tells its content."""
ANNOTATION_RESTARTS: Final = "yuan2.dev/restarts"
"""On a Job: restarts counted when it was made, should the status be lost."""
ANNOTATION_MODEL_FINGERPRINT: Final = "yuan2.dev/model-fingerprint"
"""On a pod template: which run made the served model, so that a re-trained model rolls the pods."""

COMPONENT_TRAINER: Final = "trainer"
COMPONENT_CONTROLLER: Final = "controller"
COMPONENT_WORKER: Final = "worker"
COMPONENT_API: Final = "api"
COMPONENT_WEB: Final = "web"

# --- inside pods --------------------------------------------------------------------------------------------

CLAIMS_DIRECTORY: Final = PurePosixPath("/mnt/claims")
"""Each distinct claim is mounted once, at `/mnt/claims/<claimName>`."""
DATASET_DIRECTORY: Final = PurePosixPath("/mnt/dataset")
"""Where a ConfigMap with conversations is mounted; the file is named after its key."""
EVALUATION_DIRECTORY: Final = PurePosixPath("/mnt/evaluation")
"""The same for the conversations to evaluate on."""
SHARED_MEMORY_DIRECTORY: Final = PurePosixPath("/dev/shm")  # noqa: S108 - a mount in a pod
SCRATCH_DIRECTORY: Final = PurePosixPath("/tmp")  # noqa: S108 - a mount in a pod
"""The only writable directory of a pod with a read-only root, beside its claims."""
EXPORT_DIRECTORY: Final = "model"
"""Directory of the exported model below a FineTune's output path."""
CHECKPOINT_DIRECTORY: Final = "checkpoints"
"""Directory of the checkpoints below it."""
ADAPTER_DIRECTORY: Final = "adapter"
"""Directory of the exported adapter below it, of LoRA and QLoRA."""

GPU_RESOURCE: Final = "nvidia.com/gpu"
GPU_PRODUCT_LABEL: Final = "nvidia.com/gpu.product"
"""Node label with the GPU's name, written by NVIDIA's GPU feature discovery."""
RUN_AS_USER: Final = 1000
RUN_AS_GROUP: Final = 1000
TRAINER_CONTAINER: Final = "pytorch"
"""PyTorchJob's name of the container; tools written for it look for this one."""
RENDEZVOUS_PORT_NAME: Final = "pytorchjob-port"
PROGRESS_PORT_NAME: Final = "progress"

TRAINER_RESERVED_ENV: Final = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "RANK",
    "PYTHONUNBUFFERED",
    "PET_MASTER_ADDR",
    "PET_MASTER_PORT",
    "PET_NODE_RANK",
    "PET_NPROC_PER_NODE",
    "PET_NNODES",
)
"""Variables of the PyTorchJob environment that the operator sets itself, and a user therefore may not."""

# --- conditions ---------------------------------------------------------------------------------------------

CONDITION_ACCEPTED: Final = "Accepted"
CONDITION_RUNNING: Final = "Running"
CONDITION_SUSPENDED: Final = "Suspended"
CONDITION_COMPLETE: Final = "Complete"
CONDITION_FAILED: Final = "Failed"
CONDITION_FINISHED: Final = "Finished"
"""True at either end, for `kubectl wait`."""
CONDITION_STALLED: Final = "Stalled"
"""True of a run that has failed: the word by which kstatus (Flux) knows it."""
CONDITION_RECONCILING: Final = "Reconciling"
"""True of a run that has not begun yet: kstatus' word as well."""
CONDITION_READY: Final = "Ready"
CONDITION_PROGRESSING: Final = "Progressing"
CONDITION_DEGRADED: Final = "Degraded"


class Reason:
    """Reasons of conditions and events, CamelCase as Kubernetes writes them."""

    # Accepted
    VALID: Final = "Valid"
    UNLIKELY_TO_FIT: Final = "UnlikelyToFit"
    INVALID_SPEC: Final = "InvalidSpec"
    STATUS_UNREADABLE: Final = "StatusUnreadable"
    CLAIM_NOT_FOUND: Final = "ClaimNotFound"
    CONFIG_MAP_NOT_FOUND: Final = "ConfigMapNotFound"
    CONFIG_MAP_KEY_NOT_FOUND: Final = "ConfigMapKeyNotFound"
    SECRET_NOT_FOUND: Final = "SecretNotFound"  # noqa: S105 - a reason
    FINETUNE_NOT_FOUND: Final = "FineTuneNotFound"
    FINETUNE_NOT_COMPLETE: Final = "FineTuneNotComplete"
    FINETUNE_FAILED: Final = "FineTuneFailed"
    OUTPUT_IN_USE: Final = "OutputInUse"
    IMAGE_NOT_SET: Final = "ImageNotSet"
    # a run of a FineTune
    PENDING: Final = "Pending"
    STARTING: Final = "Starting"
    STARTED: Final = "Started"
    TRAINING: Final = "Training"
    PROGRESS_UNKNOWN: Final = "ProgressUnknown"
    RESTARTING: Final = "Restarting"
    SUSPENDED: Final = "Suspended"
    SUSPENDING: Final = "Suspending"
    NOT_SUSPENDED: Final = "NotSuspended"
    SUCCEEDED: Final = "Succeeded"
    NOT_FINISHED: Final = "NotFinished"
    FINISHED: Final = "Finished"
    # why an attempt ended
    CRASHED: Final = "Crashed"
    DISRUPTED: Final = "Disrupted"
    PODS_NOT_TOGETHER: Final = "PodsNotTogether"
    PREEMPTED: Final = "Preempted"
    DRAINED: Final = "Drained"
    TERMINATED: Final = "Terminated"
    STALLED: Final = "Stalled"
    TOO_MANY_RESTARTS: Final = "TooManyRestarts"
    NO_PROGRESS: Final = "NoProgress"
    DEADLINE_EXCEEDED: Final = "DeadlineExceeded"
    # what is wrong with a pod
    UNSCHEDULABLE: Final = "Unschedulable"
    IMAGE_PULL_FAILED: Final = "ImagePullFailed"
    CONTAINER_CREATING: Final = "ContainerCreating"
    CONTAINER_CONFIG_ERROR: Final = "ContainerConfigError"
    CRASH_LOOP: Final = "CrashLoop"
    OUT_OF_MEMORY: Final = "OutOfMemory"
    EVICTED: Final = "Evicted"
    NODE_LOST: Final = "NodeLost"
    NOT_READY: Final = "NotReady"
    # a Service
    READY: Final = "Ready"
    SCALED_TO_ZERO: Final = "ScaledToZero"
    NOT_ACCEPTED: Final = "NotAccepted"
    ROLLING_OUT: Final = "RollingOut"
    ROLLED_OUT: Final = "RolledOut"
    HEALTHY: Final = "Healthy"
    PODS_MISSING: Final = "PodsMissing"
    RECONCILE_FAILED: Final = "ReconcileFailed"
