"""How the pods of a run are told to a queue or a gang scheduler. Pure.

Kueue knows a run as one pod group (https://kueue.sigs.k8s.io/docs/tasks/run/plain_pods/): its Workload lives
as long as the run, so a restart keeps the quota (docs/adr/0011). The labels stand on the pods alone: a Job
with them would get a Workload of its own for each attempt.
"""

from __future__ import annotations

from yuan2_operator.constants import COMPONENT_TRAINER
from yuan2_operator.manifests.common import Manifest, metadata
from yuan2_operator.plan.finetune import FineTunePlan
from yuan2_operator.plan.scheduling import in_kueue, workload_name

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_GROUP = "kueue.x-k8s.io/pod-group-name"
KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
KUEUE_COUNT = "kueue.x-k8s.io/pod-group-total-count"
COSCHEDULING_GROUP = "scheduling.x-k8s.io/pod-group"
COSCHEDULING_SCHEDULER = "scheduler-plugins-scheduler"
"""Name of the second scheduler in the Helm chart of scheduler-plugins."""
VOLCANO_GROUP = "scheduling.k8s.io/group-name"
VOLCANO_SCHEDULER = "volcano"


def scheduled(plan: FineTunePlan, template: Manifest) -> Manifest:
    """A pod template with what its queue and its scheduler know it by."""
    wanted, own = plan.spec.scheduling, template["metadata"]
    labels, annotations = dict(own["labels"]), dict(own.get("annotations", {}))
    spec = dict(template["spec"])
    if in_kueue(wanted):
        labels |= {KUEUE_QUEUE: str(wanted.queue_name), KUEUE_GROUP: workload_name(plan.owner)}
        annotations[KUEUE_COUNT] = str(plan.spec.workers.replicas)
        if wanted.priority_class is not None:
            labels[KUEUE_PRIORITY] = wanted.priority_class
    if wanted.gang == "coscheduling":
        labels[COSCHEDULING_GROUP] = plan.owner.name
        spec["schedulerName"] = COSCHEDULING_SCHEDULER
    if wanted.gang == "volcano":
        annotations[VOLCANO_GROUP] = plan.owner.name
        spec["schedulerName"] = VOLCANO_SCHEDULER
    return {
        **template,
        "metadata": {"labels": labels, **({"annotations": annotations} if annotations else {})},
        "spec": spec,
    }


def pod_groups(plan: FineTunePlan) -> list[Manifest]:
    """The PodGroup by which a gang scheduler starts all pods or none; empty without one."""
    wanted = plan.spec.scheduling
    if wanted.gang in (None, "none"):
        return []
    spec: Manifest = {"minMember": plan.spec.workers.replicas}
    if wanted.gang == "volcano":
        version = "scheduling.volcano.sh/v1beta1"
        spec |= {"queue": wanted.queue_name} if wanted.queue_name is not None else {}
        spec |= {"priorityClassName": wanted.priority_class} if wanted.priority_class is not None else {}
    else:
        version = "scheduling.x-k8s.io/v1alpha1"
    made = metadata(plan.owner, plan.owner.name, COMPONENT_TRAINER)
    return [{"apiVersion": version, "kind": "PodGroup", "metadata": made, "spec": spec}]
