"""deploy/base on the real API server: it is taken, and the operator may do what it needs and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[3]
OPERATOR = "system:serviceaccount:yuan2-system:yuan2-operator"

ALLOWED = [
    ("watch", "yuan2finetunes.yuan2.dev"),
    ("watch", "yuan2services.yuan2.dev"),
    ("patch", "yuan2finetunes.yuan2.dev/status"),
    ("patch", "yuan2services.yuan2.dev/status"),
    ("update", "yuan2services.yuan2.dev/finalizers"),
    ("create", "jobs.batch"),
    ("patch", "deployments.apps"),
    ("watch", "services"),
    ("delete", "services"),
    ("watch", "configmaps"),
    ("get", "configmaps"),
    ("watch", "poddisruptionbudgets.policy"),
    ("create", "poddisruptionbudgets.policy"),
    ("watch", "networkpolicies.networking.k8s.io"),
    ("delete", "networkpolicies.networking.k8s.io"),
    ("watch", "customresourcedefinitions.apiextensions.k8s.io"),
    ("watch", "pods"),
    ("get", "persistentvolumeclaims"),
    ("get", "secrets"),
    ("list", "nodes"),
    ("create", "events.events.k8s.io"),
]
DENIED = [
    ("patch", "yuan2finetunes.yuan2.dev"),
    ("update", "yuan2services.yuan2.dev"),
    ("delete", "yuan2finetunes.yuan2.dev"),
    ("list", "secrets"),
    ("watch", "secrets"),
    ("create", "secrets"),
    ("list", "persistentvolumeclaims"),
    ("delete", "persistentvolumeclaims"),
    ("create", "pods"),
    ("create", "pods/exec"),
    ("get", "pods/proxy"),
    ("patch", "events.events.k8s.io"),
    ("watch", "nodes"),
    ("create", "clusterroles.rbac.authorization.k8s.io"),
    ("patch", "customresourcedefinitions.apiextensions.k8s.io"),
]


@pytest.fixture(scope="module")
def installed(control_plane: Any) -> Any:
    """The control plane with the operator installed, without a pod: there is no node."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(ROOT / "deploy" / "base"))
    return control_plane


def may(cluster: Any, verb: str, resource: str) -> bool:
    """Whether the operator may, as the API server's authorizer says; an error is none of both.

    Raises ClusterError.
    """
    plain, _, subresource = resource.partition("/")
    name, _, group = plain.partition(".")
    attributes = {
        "verb": verb,
        "resource": name,
        "group": group,
        "subresource": subresource,
        "namespace": "default",
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": OPERATOR, "resourceAttributes": attributes},
    }
    answer = json.loads(cluster.kubectl("create", "-f", "-", "-o", "json", input=json.dumps(review)))
    assert not answer["status"].get("evaluationError"), answer
    return bool(answer["status"]["allowed"])


def test_what_is_asked_for_exists(installed):
    """Nobody may touch a resource that is misspelled."""
    known = installed.kubectl("api-resources", "-o", "name").split()
    assert {resource.partition("/")[0] for _, resource in ALLOWED + DENIED} <= set(known)


@pytest.mark.parametrize(("verb", "resource"), ALLOWED)
def test_the_operator_may_do_what_it_needs(installed, verb, resource):
    assert may(installed, verb, resource)


@pytest.mark.parametrize(("verb", "resource"), DENIED)
def test_the_operator_may_do_nothing_else(installed, verb, resource):
    assert not may(installed, verb, resource)


def test_the_component_for_the_proxy_adds_its_right_and_its_setting(installed, tmp_path):
    folder = ROOT / "deploy" / "components" / "progress-proxy"
    parts = {"resources": [ROOT / "deploy" / "base"], "components": [folder]}
    overlay = {key: [os.path.relpath(path, tmp_path) for path in paths] for key, paths in parts.items()}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(overlay))
    objects = list(yaml.safe_load_all(installed.kubectl("kustomize", str(tmp_path))))
    role = next(
        obj for obj in objects if obj["kind"] == "ClusterRole" and obj["metadata"]["name"] == "yuan2-operator"
    )
    assert {"apiGroups": [""], "resources": ["pods/proxy"], "verbs": ["get"]} in role["rules"]
    settings = next(obj for obj in objects if obj["metadata"]["name"].startswith("yuan2-operator-settings-"))
    assert settings["data"]["YUAN2_PROGRESS_VIA"] == "proxy"
    assert settings["data"]["YUAN2_TRAIN_IMAGE"] == "yuan2/train:latest"


def test_the_settings_reach_the_pod_under_a_name_that_changes_with_them(installed):
    query = "jsonpath={.spec.template.spec.containers[0].envFrom[0].configMapRef.name}"
    name = installed.kubectl("get", "-n", "yuan2-system", "deployment/yuan2-operator", "-o", query)
    assert name.startswith("yuan2-operator-settings-")
    image = installed.kubectl(
        "get", "-n", "yuan2-system", f"configmap/{name}", "-o", "jsonpath={.data.YUAN2_TRAIN_IMAGE}"
    )
    assert image == "yuan2/train:latest"


def test_the_pod_is_one_that_a_restricted_namespace_takes(installed):
    query = "jsonpath={.spec.template.spec}"
    spec = installed.kubectl("get", "-n", "yuan2-system", "deployment/yuan2-operator", "-o", query)
    labels = {"metadata": {"name": "probe", "namespace": "yuan2-system"}, "apiVersion": "v1", "kind": "Pod"}
    made = '{"spec":' + spec + "," + str(labels).replace("'", '"')[1:]
    installed.kubectl("create", "--dry-run=server", "-f", "-", input=made)
