"""What a user may lay over a pod, what is rejected, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.attempts import spec_of
from tests.support.services import IMAGE, OWNER, plan_of
from tests.support.services import spec_of as service_spec
from yuan2_operator.api.pods import PodTemplate
from yuan2_operator.api.service import ServiceStatus
from yuan2_operator.constants import KIND_FINETUNE, Reason
from yuan2_operator.manifests.finetune import training_job
from yuan2_operator.manifests.pod_template import merged
from yuan2_operator.manifests.service import service_manifests
from yuan2_operator.plan.capacity import demand
from yuan2_operator.plan.estimate import gpu_of
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.pod_template import OF_TRAINER, PRIVILEGES, reject_template
from yuan2_operator.plan.references import Rejection
from yuan2_operator.plan.service import plan_service

TUNE = Owner(KIND_FINETUNE, "alpaca", "demo", "uid-1", 1)
MAIN = "pytorch"
SHARED = {"name": "shared", "emptyDir": {}}


def decide(
    template: dict[str, Any], privileges: tuple[str, ...] = (), **workers: Any
) -> FineTunePlan | Rejection:
    spec = spec_of(workers={"podTemplate": template, **workers})
    return plan_finetune(
        TUNE, spec, attempt=1, restarts=0, missing=(), default_image=IMAGE, privileges=privileges
    )


def pod(template: dict[str, Any], privileges: tuple[str, ...] = (), **workers: Any) -> dict[str, Any]:
    """The pod template of the Job."""
    plan = decide(template, privileges, **workers)
    assert isinstance(plan, FineTunePlan), plan
    return training_job(plan)["spec"]["template"]


def message(template: dict[str, Any], privileges: tuple[str, ...] = ()) -> str:
    rejection = decide(template, privileges)
    assert isinstance(rejection, Rejection), template
    assert rejection.reason == Reason.INVALID_SPEC
    assert "\n" not in rejection.message
    return rejection.message


def main(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": MAIN, **fields}]}}


def test_any_field_of_a_pod_is_taken():
    made = pod(
        {
            "metadata": {"labels": {"cost": "a"}, "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"}},
            "spec": {
                "serviceAccountName": "trainer",
                "schedulerName": "other",
                "runtimeClassName": "nvidia",
                "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "gpus"}],
                "containers": [{"name": MAIN, "resources": {"claims": [{"name": "gpus"}]}}],
                "securityContext": {"runAsUser": 4711, "fsGroup": None, "supplementalGroups": [20]},
            },
        }
    )
    spec, labels = made["spec"], made["metadata"]["labels"]
    assert (spec["serviceAccountName"], spec["schedulerName"]) == ("trainer", "other")
    assert (spec["runtimeClassName"], labels["cost"]) == ("nvidia", "a")
    assert made["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "rdma"}
    assert labels["yuan2.dev/finetune"] == "alpaca"
    [container] = spec["containers"]
    assert container["resources"]["claims"] == [{"name": "gpus"}]
    assert container["resources"]["requests"] == {"cpu": "1000m", "memory": "1Gi"}
    context = spec["securityContext"]
    assert (context["runAsUser"], context["supplementalGroups"], context["runAsNonRoot"]) == (
        4711,
        [20],
        True,
    )
    assert "fsGroup" not in context


def test_lists_are_merged_by_their_keys():
    template = main(
        env=[{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "NEW", "value": "1"}],
        volumeMounts=[{"name": "shared", "mountPath": "/opt/shared"}],
    )
    template["spec"] |= {"volumes": [SHARED], "tolerations": [{"key": "mine", "operator": "Exists"}]}
    spec = pod(template, env=[{"name": "NCCL_DEBUG", "value": "WARN"}], tolerations=[{"key": "theirs"}])[
        "spec"
    ]
    [container] = spec["containers"]
    values = [(entry["name"], entry.get("value")) for entry in container["env"]]
    assert {("NCCL_DEBUG", "INFO"), ("NEW", "1"), ("WORLD_SIZE", "2")} <= set(values)
    assert ("NCCL_DEBUG", "WARN") not in values
    assert {"claim-0", "shared", "job"} <= {volume["name"] for volume in spec["volumes"]}
    assert {"/opt/shared", "/dev/shm"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    keys = [toleration["key"] for toleration in spec["tolerations"]]
    assert {"mine", "theirs", "node.kubernetes.io/unreachable"} <= set(keys)


def test_a_toleration_of_the_template_takes_the_operators_own_out():
    taint = "node.kubernetes.io/unreachable"
    template = {"spec": {"tolerations": [{"key": taint, "operator": "Exists", "tolerationSeconds": 5}]}}
    found = [entry for entry in pod(template)["spec"]["tolerations"] if entry["key"] == taint]
    assert [entry["tolerationSeconds"] for entry in found] == [5]


def test_a_container_that_is_added_is_confined():
    sidecar = {"name": "logs", "image": "x", "restartPolicy": "Always", "securityContext": {"runAsUser": 5}}
    [made] = pod({"spec": {"initContainers": [sidecar]}})["spec"]["initContainers"]
    assert made["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "runAsUser": 5,
    }


def test_the_node_selector_of_the_template_counts_for_room_and_estimate():
    label = {"nvidia.com/gpu.product": "NVIDIA-L20"}
    spec = spec_of(
        workers={
            "processesPerWorker": None,
            "gpusPerWorker": 2,
            "gpuResource": "amd.com/gpu",
            "nodeSelector": {"zone": "a"},
            "podTemplate": {"spec": {"nodeSelector": label}},
        }
    )
    wanted = demand(spec)
    assert wanted is not None
    assert (wanted.resource, dict(wanted.node_selector)) == ("amd.com/gpu", {"zone": "a", **label})
    gpu = gpu_of(spec)
    assert gpu is not None
    assert "L20" in gpu.name


def test_gpus_of_another_vendor():
    spec = pod({}, processesPerWorker=None, gpusPerWorker=2, gpuResource="amd.com/gpu")["spec"]
    assert spec["containers"][0]["resources"]["limits"] == {"amd.com/gpu": "2"}


PRIVILEGED = {
    "hostNetwork": ({"spec": {"hostNetwork": True}}, "spec.hostNetwork"),
    "hostPID": ({"spec": {"hostPID": True}}, "spec.hostPID"),
    "hostIPC": ({"spec": {"hostIPC": True}}, "spec.hostIPC"),
    "hostPath": (
        {"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}},
        "spec.volumes[v].hostPath",
    ),
    "volumeTypes": ({"spec": {"volumes": [{"name": "v", "nfs": {"server": "s"}}]}}, "spec.volumes[v].nfs"),
    "hostPort": (main(ports=[{"containerPort": 1, "hostPort": 1}]), "ports[1].hostPort"),
    "privileged": (main(securityContext={"privileged": True}), "securityContext.privileged"),
    "capabilities": (main(securityContext={"capabilities": {"add": ["IPC_LOCK"]}}), "capabilities"),
    "procMount": (main(securityContext={"procMount": "Unmasked"}), "procMount"),
    "root": ({"spec": {"securityContext": {"runAsUser": 0}}}, "spec.securityContext.runAsUser"),
    "unconfined": (
        {"spec": {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}},
        "spec.securityContext.seccompProfile",
    ),
    "seLinux": ({"spec": {"securityContext": {"seLinuxOptions": {"type": "spc_t"}}}}, "seLinuxOptions"),
    "sysctls": (
        {"spec": {"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}},
        "sysctls",
    ),
    "serviceAccountToken": ({"spec": {"automountServiceAccountToken": True}}, "automountServiceAccountToken"),
}


def test_every_privilege_has_a_case():
    assert sorted(PRIVILEGED) == sorted(PRIVILEGES)


@pytest.mark.parametrize("name", PRIVILEGES)
def test_what_breaks_the_isolation_is_rejected_unless_it_is_allowed(name):
    template, path = PRIVILEGED[name]
    text = message(template)
    assert text.startswith("spec.workers.podTemplate.spec.")
    assert path in text
    assert f"YUAN2_POD_PRIVILEGES=demo/{name}" in text
    assert message(template, (f"other/{name}",)) == text
    for allowed in (name, f"demo/{name}"):
        assert isinstance(decide(template, (allowed,)), FineTunePlan)


@pytest.mark.parametrize(
    "template",
    [
        main(securityContext={"allowPrivilegeEscalation": True}),
        main(securityContext={"capabilities": {"drop": []}}),
        main(securityContext={"runAsNonRoot": False}),
        main(securityContext={"appArmorProfile": {"type": "Unconfined"}}),
        {"spec": {"initContainers": [{"name": "x", "securityContext": {"privileged": True}}]}},
        {"spec": {"securityContext": {"windowsOptions": {"hostProcess": True}}}},
        {"spec": {"volumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {}}]}}]}},
        {"spec": {"securityContext": None}},
        {"spec": {"securityContext": {"seccompProfile": None}}},
        main(securityContext={"capabilities": None}),
    ],
)
def test_ways_around_are_rejected(template):
    assert "spec.workers.podTemplate.spec" in message(template)


OWNED = {
    "spec.restartPolicy": {"spec": {"restartPolicy": "Always"}},
    "spec.subdomain": {"spec": {"subdomain": "x"}},
    "spec.nodeName": {"spec": {"nodeName": "a"}},
    "spec.terminationGracePeriodSeconds": {"spec": {"terminationGracePeriodSeconds": 5}},
    f"spec.containers[{MAIN}].command": main(command=["sh"]),
    f"spec.containers[{MAIN}].image": main(image="x"),
    f"spec.containers[{MAIN}].resources.limits": main(resources={"limits": {"cpu": 1}}),
    f"spec.containers[{MAIN}].env[PET_NNODES]": main(env=[{"name": "PET_NNODES", "value": "1"}]),
    f"spec.containers[{MAIN}].volumeMounts[/mnt/claims/x]": main(
        volumeMounts=[{"name": "x", "mountPath": "/mnt/claims/x"}]
    ),
    f"spec.containers[{MAIN}].volumeMounts[/mnt/]": main(volumeMounts=[{"name": "x", "mountPath": "/mnt/"}]),
    "metadata.labels[yuan2.dev/finetune]": {"metadata": {"labels": {"yuan2.dev/finetune": "x"}}},
    "metadata.labels[job-name]": {"metadata": {"labels": {"job-name": "x"}}},
}


@pytest.mark.parametrize("path", OWNED)
def test_what_the_operator_owns_is_rejected_by_name(path):
    everything = tuple(PRIVILEGES)
    assert message(OWNED[path], everything).startswith(f"spec.workers.podTemplate.{path}: ")


def test_no_volume_of_the_operator_can_be_replaced():
    spec = spec_of(
        dataset={"source": {"persistentVolumeClaim": None, "configMap": {"name": "talk", "key": "a"}}}
    )
    plan = plan_finetune(TUNE, spec, attempt=1, restarts=0, missing=(), default_image=IMAGE)
    assert isinstance(plan, FineTunePlan)
    names = {volume["name"] for volume in training_job(plan)["spec"]["template"]["spec"]["volumes"]}
    served = service_manifests(
        plan_of(service_spec(api={"keysSecret": {"name": "k"}}, web={"enabled": True}))
    )
    for made in served:
        if made["kind"] == "Deployment":
            names |= {volume["name"] for volume in made["spec"]["template"]["spec"]["volumes"]}
    assert {"job", "shm", "dataset", "claim-0", "keys", "scratch"} <= names
    for name in names:
        assert f"spec.volumes[{name}]" in message({"spec": {"volumes": [{"name": name, "emptyDir": {}}]}})


@pytest.mark.parametrize(
    "spec",
    [
        {"containers": "x"},
        {"containers": [{"image": "x"}]},
        {"volumes": [1]},
        {"securityContext": []},
        {"securityContext": {"capabilities": "ALL"}},
        {"hostAliases": [{"hostnames": ["a"]}]},
        {"securityContext": {"sysctls": {"name": "x"}}},
        {"tolerations": "all"},
        {"containers": [{"name": MAIN, "env": {"A": "b"}}]},
    ],
)
def test_what_has_the_wrong_shape_is_a_sentence(spec):
    assert ": write " in message({"spec": spec})


def test_each_component_of_a_service_has_its_own():
    template = {"metadata": {"labels": {"cost": "b"}}, "spec": {"runtimeClassName": "nvidia"}}
    plan = plan_of(service_spec(worker={"podTemplate": template}))
    deployments = {m["metadata"]["name"]: m for m in service_manifests(plan) if m["kind"] == "Deployment"}
    worker = deployments["alpaca-worker"]["spec"]
    assert worker["template"]["spec"]["runtimeClassName"] == "nvidia"
    assert worker["template"]["metadata"]["labels"]["cost"] == "b"
    assert "cost" not in worker["selector"]["matchLabels"]
    assert "runtimeClassName" not in deployments["alpaca-api"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("component", "template"),
    [
        ("worker", {"spec": {"hostNetwork": True}}),
        (
            "api",
            {
                "spec": {
                    "containers": [
                        {"name": "yuan2-api", "volumeMounts": [{"name": "x", "mountPath": "/tmp"}]}
                    ]
                }
            },
        ),
        ("controller", {"spec": {"containers": [{"name": "yuan2-controller", "readinessProbe": {}}]}}),
        ("web", {"spec": {"containers": [{"name": "yuan2-web", "env": [{"name": "HOME", "value": "/"}]}]}}),
    ],
)
def test_a_template_of_a_service_is_judged_alike(component, template):
    decision = plan_service(
        OWNER,
        service_spec(**{component: {"podTemplate": template}}),
        ServiceStatus(),
        finetune=None,
        missing=(),
        default_image=IMAGE,
    )
    assert isinstance(decision, Rejection)
    assert decision.message.startswith(f"spec.{component}.podTemplate.spec.")


def test_a_merge_leaves_its_arguments_alone():
    base = {"a": {"b": 1}, "volumes": [{"name": "x", "emptyDir": {}}]}
    assert merged(base, {"a": {"c": 2}, "volumes": [{"name": "y"}]}) == {
        "a": {"b": 1, "c": 2},
        "volumes": [{"name": "x", "emptyDir": {}}, {"name": "y"}],
    }
    assert base == {"a": {"b": 1}, "volumes": [{"name": "x", "emptyDir": {}}]}


def test_without_a_template_nothing_is_refused():
    assert reject_template(None, "x", OF_TRAINER, "demo", ()) is None
    assert reject_template(PodTemplate(), "x", OF_TRAINER, "demo", ()) is None
