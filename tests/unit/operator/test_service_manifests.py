"""The Kubernetes objects of a Yuan2Service."""

from __future__ import annotations

import json

import pytest

from tests.support.services import IMAGE, OWNER, VLLM_IMAGE, manifest, plan_of, spec_of
from yuan2_operator.manifests.service import FASTCHAT_PROGRAM, obsolete, service_manifests
from yuan2_operator.plan.owner import selector_labels
from yuan2_operator.plan.service import config_name

FULL = spec_of(
    imagePullSecrets=[{"name": "registry"}],
    imagePullPolicy="Always",
    worker={
        "replicas": 2,
        "gpusPerWorker": 1,
        "resources": {"requests": {"cpu": 2}, "limits": {"memory": "8Gi"}},
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "kubernetes.io/hostname"}]
            }
        },
        "priorityClassName": "serving",
    },
    controller={"dispatch": "lottery"},
    api={"replicas": 3, "port": 9000, "keysSecret": {"name": "keys"}},
    web={"enabled": True, "port": 7000},
)


def pod_spec(plan, component):
    return manifest(plan, "Deployment", f"alpaca-{component}")["spec"]["template"]["spec"]


def container(plan, component):
    [only] = pod_spec(plan, component)["containers"]
    return only


def test_the_children_are_applied_config_first_and_pods_last():
    kinds = [m["kind"] for m in service_manifests(plan_of(FULL))]
    budgets, networks = ["PodDisruptionBudget"] * 2, ["NetworkPolicy"] * 2
    assert kinds == ["ConfigMap", "ConfigMap", *["Service"] * 3, *budgets, *networks, *["Deployment"] * 4]


def test_without_the_web_page_there_are_three_deployments_and_two_services():
    names = [(m["kind"], m["metadata"]["name"]) for m in service_manifests(plan_of())]
    policies = ("PodDisruptionBudget", "NetworkPolicy")
    assert [name for name in names[2:] if name[0] not in policies] == [
        ("Service", "alpaca-controller"),
        ("Service", "alpaca-api"),
        ("Deployment", "alpaca-controller"),
        ("Deployment", "alpaca-worker"),
        ("Deployment", "alpaca-api"),
    ]


def test_pods_that_users_connect_to_count_only_once_the_nodes_know_their_address():
    waits = {
        m["metadata"]["name"]: m["spec"].get("minReadySeconds", 0)
        for m in service_manifests(plan_of(FULL))
        if m["kind"] == "Deployment"
    }
    assert waits == {"alpaca-controller": 0, "alpaca-worker": 0, "alpaca-api": 3, "alpaca-web": 3}


def test_every_child_goes_with_its_owner():
    for made in service_manifests(plan_of(FULL)):
        [reference] = made["metadata"]["ownerReferences"]
        assert (reference["kind"], reference["name"], reference["uid"]) == ("Yuan2Service", "alpaca", "uid-1")
        assert reference["controller"]
        assert made["metadata"]["namespace"] == OWNER.namespace
        assert made["metadata"]["labels"]["yuan2.dev/service"] == "alpaca"


def test_the_pods_read_the_job_that_was_planned():
    plan = plan_of(FULL)
    for component in ("worker", "api"):
        config = manifest(plan, "ConfigMap", config_name(plan, component))
        assert json.loads(config["data"]["job.json"]) == json.loads(plan.job.to_json())
        assert config["immutable"]
        [volume] = [v for v in pod_spec(plan, component)["volumes"] if v["name"] == "job"]
        assert volume["configMap"] == {"name": config_name(plan, component)}
        [mount] = [m for m in container(plan, component)["volumeMounts"] if m["name"] == "job"]
        assert mount == {
            "name": "job",
            "mountPath": "/etc/yuan2/job.json",
            "subPath": "job.json",
            "readOnly": True,
        }


@pytest.mark.parametrize("component", ["controller", "worker", "api", "web"])
def test_no_pod_has_credentials_privileges_or_a_writable_root(component):
    pod = pod_spec(plan_of(FULL), component)
    [only] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1000, 1000)
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = [m["mountPath"] for m in only["volumeMounts"] if not m.get("readOnly")]
    assert set(writable) <= {"/tmp", "/dev/shm"}


@pytest.mark.parametrize("component", ["controller", "worker", "api", "web"])
def test_every_mount_has_its_volume(component):
    pod = pod_spec(plan_of(FULL), component)
    [only] = pod["containers"]
    assert {m["name"] for m in only["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("component", ["controller", "worker", "api", "web"])
def test_every_pod_is_pulled_and_probed_as_the_spec_says(component):
    plan = plan_of(FULL)
    only = container(plan, component)
    assert only["imagePullPolicy"] == "Always"
    assert pod_spec(plan, component)["imagePullSecrets"] == [{"name": "registry"}]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= only.keys()


def test_the_worker_has_what_the_user_asked_for():
    plan = plan_of(FULL)
    pod, only = pod_spec(plan, "worker"), container(plan, "worker")
    assert only["command"] == ["python", "-m", "yuan2_server", "worker"]
    assert only["resources"] == {"requests": {"cpu": "2"}, "limits": {"memory": "8Gi", "nvidia.com/gpu": "1"}}
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["priorityClassName"] == "serving"
    anti = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert anti == [{"topologyKey": "kubernetes.io/hostname"}]
    assert manifest(plan, "Deployment", "alpaca-worker")["spec"]["replicas"] == 2


def test_the_worker_knows_its_address_and_reads_the_model_only():
    only = container(plan_of(), "worker")
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    assert address in only["env"]
    [mount] = [m for m in only["volumeMounts"] if m["mountPath"].startswith("/mnt/claims")]
    assert mount == {"name": "claim-0", "mountPath": "/mnt/claims/models", "readOnly": True}


def test_a_worker_on_cpu_asks_for_no_gpu():
    assert container(plan_of(), "worker")["resources"] == {}


@pytest.mark.parametrize(("gpus", "surge"), [(0, 1), (1, 0)])
def test_workers_with_gpus_are_replaced_in_place(gpus, surge):
    spec = manifest(plan_of(spec_of(worker={"gpusPerWorker": gpus})), "Deployment", "alpaca-worker")["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxSurge"] == surge


def test_there_is_never_a_second_controller():
    spec = manifest(plan_of(FULL), "Deployment", "alpaca-controller")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    command = spec["template"]["spec"]["containers"][0]["command"]
    assert command[:4] == [*FASTCHAT_PROGRAM, "fastchat.serve.controller"]
    assert command[-2:] == ["--dispatch-method", "lottery"]


def test_a_dead_worker_is_forgotten_within_seconds():
    plan = plan_of()
    expiry = {"name": "FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION", "value": "15"}
    interval = {"name": "FASTCHAT_WORKER_HEART_BEAT_INTERVAL", "value": "5"}
    assert expiry in container(plan, "controller")["env"]
    assert interval in container(plan, "worker")["env"]


def test_the_api_reads_its_keys_from_the_secret_and_listens_on_its_port():
    plan = plan_of(FULL)
    only = container(plan, "api")
    assert {"name": "keys", "mountPath": "/etc/yuan2/keys", "readOnly": True} in only["volumeMounts"]
    [volume] = [v for v in pod_spec(plan, "api")["volumes"] if v["name"] == "keys"]
    assert volume["secret"] == {"secretName": "keys", "defaultMode": 0o440}
    assert only["ports"] == [{"name": "http", "containerPort": 9000, "protocol": "TCP"}]
    [port] = manifest(plan, "Service", "alpaca-api")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (9000, "http")


def test_without_a_secret_no_keys_are_mounted():
    assert [v["name"] for v in pod_spec(plan_of(), "api")["volumes"]] == ["scratch", "job"]


def test_the_web_page_talks_to_the_controller():
    command = container(plan_of(FULL), "web")["command"]
    assert command[command.index("--controller-url") + 1] == "http://alpaca-controller.demo.svc:8503"
    assert command[command.index("--port") + 1] == "7000"


def test_a_service_selects_the_pods_of_its_deployment():
    plan = plan_of(FULL)
    for component in ("controller", "api", "web"):
        selector = manifest(plan, "Service", f"alpaca-{component}")["spec"]["selector"]
        made = manifest(plan, "Deployment", f"alpaca-{component}")["spec"]
        assert selector.items() <= made["template"]["metadata"]["labels"].items()
        assert made["selector"]["matchLabels"] == selector


def test_the_page_asks_for_a_key_where_the_api_does():
    plain = container(plan_of(spec_of(web={"enabled": True})), "web")
    assert plain["command"][:4] == [*FASTCHAT_PROGRAM, "fastchat.serve.gradio_web_server"]
    assert [m["name"] for m in plain["volumeMounts"]] == ["scratch"]
    plan = plan_of(FULL)
    gated = container(plan, "web")
    assert gated["command"][2:8] == ["yuan2_server", "web", "--port", "7000", "--page-port", "7001"]
    assert {"name": "keys", "mountPath": "/etc/yuan2/keys", "readOnly": True} in gated["volumeMounts"]
    assert gated["readinessProbe"]["httpGet"]["path"] == "/healthz"
    [volume] = [v for v in pod_spec(plan, "web")["volumes"] if v["name"] == "keys"]
    assert volume["secret"]["secretName"] == "keys"
    last = plan_of(spec_of(web={"enabled": True, "port": 65535}, api={"keysSecret": {"name": "keys"}}))
    assert "65534" in container(last, "web")["command"]


def existing(plan):
    return {(made["kind"], made["metadata"]["name"]) for made in service_manifests(plan)}


def test_what_is_not_wanted_any_more_is_removed():
    before = plan_of(spec_of(web={"enabled": True}))
    after = plan_of(spec_of(networkPolicy={"enabled": False}))
    keys = obsolete(after, existing(before), settled=True)
    assert [(key.kind, key.name) for key in keys] == [
        ("Deployment", "alpaca-web"),
        ("NetworkPolicy", "alpaca-controller"),
        ("NetworkPolicy", "alpaca-worker"),
        ("Service", "alpaca-web"),
    ]
    assert obsolete(after, existing(after), settled=True) == []


def test_job_files_of_earlier_revisions_stay_until_the_rollout_has_settled():
    before, after = plan_of(), plan_of(spec_of(worker={"precision": "fp32"}))
    there = existing(before) | existing(after) | {("ConfigMap", "alpaca-serve")}
    assert obsolete(after, there, settled=False) == []
    names = {key.name for key in obsolete(after, there, settled=True)}
    assert names == {"alpaca-serve", config_name(before, "worker")}


@pytest.mark.parametrize(
    ("component", "port", "callers"),
    [("controller", 8503, ["worker", "api", "web"]), ("worker", 8504, ["api", "web", "controller"])],
)
def test_what_asks_for_no_key_is_reached_by_those_who_need_it(component, port, callers):
    prometheus = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app": "prometheus"}},
    }
    plan = plan_of(spec_of(networkPolicy={"allowFrom": [prometheus]}))
    spec = manifest(plan, "NetworkPolicy", f"alpaca-{component}")["spec"]
    assert spec["podSelector"] == {"matchLabels": selector_labels(OWNER, component)}
    [rule] = spec["ingress"]
    own, other = rule["from"]
    assert own["podSelector"]["matchLabels"] == {"yuan2.dev/service": "alpaca"}
    assert own["podSelector"]["matchExpressions"][0]["values"] == callers
    assert other == prometheus
    assert rule["ports"] == [{"port": port, "protocol": "TCP"}]


@pytest.mark.parametrize("component", ["worker", "api"])
def test_nodes_are_drained_one_pod_after_the_other_and_pods_spread(component):
    plan = plan_of(spec_of())
    labels = selector_labels(OWNER, component)
    budget = manifest(plan, "PodDisruptionBudget", f"alpaca-{component}")["spec"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    [spread] = pod_spec(plan, component)["topologySpreadConstraints"]
    assert (spread["whenUnsatisfiable"], spread["labelSelector"]) == (
        "ScheduleAnyway",
        {"matchLabels": labels},
    )


@pytest.mark.parametrize("component", ["controller", "worker", "api", "web"])
def test_every_part_tolerates_and_is_placed_as_its_section_says(component):
    placed = {
        "nodeSelector": {"pool": "serving"},
        "tolerations": [{"key": "serving", "operator": "Exists"}],
        "priorityClassName": "serving",
    }
    section = {**placed, "enabled": True} if component == "web" else placed
    pod = pod_spec(plan_of(spec_of(**{component: section})), component)
    assert {name: pod[name] for name in placed} == placed


def test_how_long_pods_may_finish_answers_is_the_specs():
    grace = {"terminationGracePeriodSeconds": 900}
    plan = plan_of(spec_of(worker=grace, api=grace))
    assert [pod_spec(plan, part)["terminationGracePeriodSeconds"] for part in ("worker", "api")] == [900, 900]


def test_a_field_that_was_taken_back_changes_the_stamp_of_its_object():
    before = manifest(plan_of(spec_of(worker={"nodeSelector": {"a": "b"}})), "Deployment", "alpaca-worker")
    after = manifest(plan_of(), "Deployment", "alpaca-worker")
    stamps = [made["metadata"]["annotations"]["yuan2.dev/applied-hash"] for made in (before, after)]
    assert stamps[0] != stamps[1]
    again = manifest(plan_of(), "Deployment", "alpaca-worker")
    assert again == after


def test_workers_with_vllm_have_its_image_and_shared_memory():
    plan = plan_of(spec_of(worker={"gpusPerWorker": 2}))
    worker = container(plan, "worker")
    assert worker["image"] == VLLM_IMAGE
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert {"name": "shm", "mountPath": "/dev/shm"} in worker["volumeMounts"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod_spec(plan, "worker")["volumes"]
    assert {container(plan, part)["image"] for part in ("controller", "api")} == {IMAGE}
    assert "shm" not in [volume["name"] for volume in pod_spec(plan_of(), "worker")["volumes"]]
