"""What the real API server takes and refuses of the two kinds: every refusal is a sentence with a way out."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from yuan2_core.sections import Checkpoint, Training
from yuan2_local.errors import ClusterError

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[3]
NAMESPACE = f"admission-{uuid4().hex[:6]}"
FINETUNE: dict[str, Any] = {
    "apiVersion": "yuan2.dev/v1alpha1",
    "kind": "Yuan2FineTune",
    "metadata": {"name": "alpaca-zh", "namespace": NAMESPACE},
    "spec": {
        "model": {
            "size": "2B",
            "source": {"persistentVolumeClaim": {"claimName": "models", "path": "yuan2-2b"}},
        },
        "dataset": {"source": {"persistentVolumeClaim": {"claimName": "data", "path": "alpaca.json"}}},
        "method": {"full": {}},
        "workers": {"replicas": 1, "gpusPerWorker": 8},
        "output": {"persistentVolumeClaim": {"claimName": "models", "path": "alpaca-zh"}},
    },
}
SERVICE: dict[str, Any] = {
    "apiVersion": "yuan2.dev/v1alpha1",
    "kind": "Yuan2Service",
    "metadata": {"name": "alpaca", "namespace": NAMESPACE},
    "spec": {"model": {"name": "yuan2", "fineTuneRef": {"name": "alpaca-zh"}}},
}
ADAPTER = {"name": "terse", "source": {"persistentVolumeClaim": {"claimName": "m", "path": "terse"}}}
PLACEMENT: dict[str, Any] = {
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
                ]
            },
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 10,
                    "preference": {"matchFields": [{"key": "metadata.name", "operator": "Exists"}]},
                }
            ],
        },
        "podAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 1,
                    "podAffinityTerm": {
                        "topologyKey": "kubernetes.io/hostname",
                        "labelSelector": {"matchLabels": {"app": "x"}},
                        "namespaceSelector": {},
                    },
                }
            ]
        },
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "kubernetes.io/hostname", "namespaces": ["other"]}
            ]
        },
    },
    "priorityClassName": "training",
    "resources": {"requests": {"cpu": 4, "memory": "8Gi", "rdma/hca": 1}, "limits": {"cpu": "4500m"}},
}
FULL_FINETUNE_SPEC: dict[str, Any] = {
    "dataset": {
        "source": {
            "persistentVolumeClaim": None,
            "configMap": {"name": "data", "key": "conversations.json"},
        },
        "format": "fastchat",
        "maxInvalidFraction": 0.01,
        "evalFraction": 0,
        "evalSource": {"configMap": {"name": "data", "key": "held-out.json"}},
    },
    "method": {
        "full": None,
        "lora": {
            "r": 16,
            "alpha": 32,
            "dropout": 0.1,
            "targetModules": ["o_proj", "down_proj"],
            "rsLora": True,
            "dora": False,
        },
    },
    "training": {
        "loss": "efficient",
        "maxSteps": 100,
        "maxLength": 2048,
        "microBatchSize": 2,
        "gradientAccumulationSteps": 8,
        "learningRate": 1e-5,
        "weightDecay": 0.1,
        "maxGradNorm": 0,
        "warmupRatio": 0,
        "schedule": "linear",
        "packing": False,
        "gradientCheckpointing": True,
        "gradientCheckpointingEvery": 2,
        "tf32": False,
        "precision": "fp32",
        "fp32Gradients": True,
        "seed": 0,
    },
    "deepspeed": {
        "stage": 3,
        "offload": "parameters",
        "overrides": {"zero_optimization": {"sub_group_size": 1e8, "offload_param": {"buffer_count": 3}}},
        "flopsProfiler": True,
    },
    "checkpoint": {"everySteps": 10, "keep": 1},
    "evaluation": {"everySteps": 5, "earlyStoppingPatience": 3, "sampleAnswers": 0},
    "output": {"mergeAdapter": True, "tensorboard": True},
    "workers": {
        "replicas": 2,
        "gpusPerWorker": None,
        "processesPerWorker": 2,
        "image": "registry.example:5000/yuan2/train@sha256:" + "0" * 64,
        "imagePullPolicy": "IfNotPresent",
        "imagePullSecrets": [{"name": "registry"}],
        **PLACEMENT,
        "sharedMemory": "1.5Gi",
        "env": [
            {"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
            {"name": "MODE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
    },
    "runPolicy": {
        "suspend": True,
        "maxRestarts": 0,
        "restartWindowSeconds": 0,
        "maxDisruptionsWithoutProgress": 0,
        "avoidFailedNodes": "Required",
        "stallTimeoutSeconds": 60,
        "activeDeadlineSeconds": 3600,
        "ttlSecondsAfterFinished": 0,
    },
}
FULL_SERVICE_SPEC: dict[str, Any] = {
    "model": {
        "fineTuneRef": None,
        "source": {"persistentVolumeClaim": {"claimName": "models", "path": "."}},
    },
    "image": "registry.example/yuan2/serve:1",
    "imagePullPolicy": "Never",
    "imagePullSecrets": [{"name": "registry"}],
    "worker": {
        "replicas": 0,
        "gpusPerWorker": 1,
        "precision": "fp16",
        "maxModelLength": 4096,
        "maxConcurrentRequests": 8,
        **PLACEMENT,
    },
    "controller": {"dispatch": "lottery", "resources": {"limits": {"memory": "512Mi"}}},
    "api": {"replicas": 2, "port": 9000, "keysSecret": {"name": "keys"}, "resources": {}},
    "web": {"enabled": True, "port": 7000, "resources": {}},
}


def merged(base: Any, patch: Any) -> Any:
    """JSON merge patch: null removes."""
    if not isinstance(patch, dict):
        return patch
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        result[key] = merged(result.get(key), value)
        if value is None:
            del result[key]
    return result


@pytest.fixture(scope="module")
def api(control_plane: Any) -> Iterator[Any]:
    """The control plane with a namespace for these tests."""
    control_plane.kubectl("create", "namespace", NAMESPACE)
    yield control_plane
    control_plane.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def dry_run(api: Any, base: dict[str, Any], spec: Any, **metadata: str) -> dict[str, Any]:
    """Send an object as a user's tools do, without keeping it; gives it as the API server would."""
    made = copy.deepcopy(base)
    made["spec"] = merged(made["spec"], spec)
    made["metadata"].update(metadata)
    text = api.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", input=json.dumps(made))
    answer: dict[str, Any] = json.loads(text)
    return answer


def refused(api: Any, base: dict[str, Any], spec: Any, **metadata: str) -> str:
    """What the API server says to a bad object."""
    with pytest.raises(ClusterError) as caught:
        dry_run(api, base, spec, **metadata)
    return str(caught.value)


# --- what is taken -----------------------------------------------------------------------------------------


def test_the_least_finetune_gets_the_published_recipe(api):
    spec = dry_run(api, FINETUNE, {})["spec"]
    recipe = Training().model_dump(mode="json", by_alias=True, exclude_none=True)
    assert spec["training"] == recipe
    assert spec["checkpoint"] == Checkpoint().model_dump(by_alias=True, exclude={"keep"})
    assert (spec["dataset"]["format"], spec["dataset"]["maxInvalidFraction"]) == ("auto", 0)
    assert spec["workers"]["sharedMemory"] == "64Gi"
    assert spec["runPolicy"] == {
        "suspend": False,
        "maxRestarts": 3,
        "restartWindowSeconds": 3600,
        "maxDisruptionsWithoutProgress": 20,
        "avoidFailedNodes": "Preferred",
        "startTimeoutSeconds": 1800,
        "phaseTimeoutSeconds": {},
    }


def test_the_least_service_gets_its_defaults(api):
    spec = dry_run(api, SERVICE, {})["spec"]
    assert (spec["api"]["port"], spec["api"]["replicas"]) == (8505, 1)
    assert spec["controller"]["dispatch"] == "shortest_queue"
    assert (spec["web"]["enabled"], spec["web"]["port"]) == (False, 7860)
    worker = {"replicas": 1, "gpusPerWorker": 0, "precision": "bf16", "maxConcurrentRequests": 64}
    assert worker.items() <= spec["worker"].items()


@pytest.mark.parametrize(
    ("base", "spec"),
    [(FINETUNE, FULL_FINETUNE_SPEC), (SERVICE, FULL_SERVICE_SPEC)],
    ids=["finetune", "service"],
)
def test_every_field_is_kept_as_it_was_written(api, base, spec):
    wanted = merged(base["spec"], spec)
    kept = dry_run(api, base, spec)["spec"]
    assert subset(wanted, kept) == wanted


def subset(wanted: Any, kept: Any) -> Any:
    """The part of `kept` that `wanted` speaks of."""
    if not isinstance(wanted, dict):
        return kept
    return {key: subset(value, kept[key]) for key, value in wanted.items() if key in kept}


EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if "apiVersion: yuan2.dev/" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", EXAMPLES, ids=[f"{path.parent.name}/{path.name}" for path in EXAMPLES])
def test_every_example_is_taken(api, path):
    api.kubectl("create", "--dry-run=server", "-n", NAMESPACE, "-f", str(path))


@pytest.mark.parametrize("quantity", [4, "512Mi", "1.5Gi", "1e9", "500m"])
def test_a_quantity_may_be_a_number_or_a_text(api, quantity):
    assert dry_run(api, FINETUNE, {"workers": {"sharedMemory": quantity}})["spec"]["workers"]["sharedMemory"]


@pytest.mark.parametrize(
    "spec",
    [
        {"method": {"full": None, "lora": None, "qlora": {}}, "model": {"size": "102B"}},
        {"method": {"full": None, "lora": {}}, "model": {"size": "51B"}},
        {"model": {"size": "51B"}, "deepspeed": {"offload": "parameters"}},
        {"model": {"size": "51B"}, "deepspeed": {"offload": "optimizer"}},
        {
            "method": {"full": None, "qlora": {"dora": True}},
            "deepspeed": {"stage": 2, "offload": "optimizer"},
        },
        {"training": {"warmupSteps": 0}},
        {"training": {"gradientCheckpointing": False}},
        {"dataset": {"evalFraction": 0.05}, "evaluation": {"earlyStoppingPatience": 2}},
    ],
    ids=str,
)
def test_what_defaults_fill_in_is_never_refused(api, spec):
    kept = dry_run(api, FINETUNE, spec)["spec"]
    assert dry_run(api, {**FINETUNE, "spec": kept}, {})["spec"] == kept


def test_an_adapter_gets_the_published_defaults(api):
    kept = dry_run(api, FINETUNE, {"method": {"full": None, "lora": {}}})["spec"]["method"]
    defaults = {"r": 8, "alpha": 16, "dropout": 0.05, "targetModules": ["q_proj", "v_proj"]}
    assert kept == {"lora": {**defaults, "rsLora": False, "dora": False}}


# --- what is refused ---------------------------------------------------------------------------------------

QLORA: dict[str, Any] = {"method": {"full": None, "qlora": {}}}
HELD_OUT: dict[str, Any] = {"configMap": {"name": "data", "key": "held-out.json"}}


def lora(**fields: Any) -> dict[str, Any]:
    """The method with an adapter."""
    return {"method": {"full": None, "lora": fields}}


DATA_PATH = {"source": {"persistentVolumeClaim": {"path": None}}}
BAD_FINETUNES = {
    "wrong enum: size": ({"model": {"size": "3B"}}, 'supported values: "2B", "51B", "102B", "custom"'),
    "wrong enum: stage": ({"deepspeed": {"stage": 1}}, 'supported values: "0", "2", "3"'),
    "wrong enum: schedule": ({"training": {"schedule": "step"}}, 'supported values: "cosine", "linear"'),
    "wrong type: epochs": ({"training": {"epochs": "three"}}, "must be of type number"),
    "wrong type: suspend": ({"runPolicy": {"suspend": "yes"}}, "must be of type boolean"),
    "wrong type: replicas": ({"workers": {"replicas": 1.5}}, "must be of type integer"),
    "two loss modes, a list": (
        {"training": {"loss": ["efficient", "last_response"]}},
        "must be of type string",
    ),
    "two loss modes, a text": (
        {"training": {"loss": "efficient,last_response"}},
        'supported values: "efficient", "last_response", "split_example"',
    ),
    "negative: epochs": ({"training": {"epochs": -1}}, "training.epochs in body should be greater than 0"),
    "negative: maxSteps": ({"training": {"maxSteps": -5}}, "should be greater than or equal to 1"),
    "negative: learningRate": ({"training": {"learningRate": -1e-5}}, "should be greater than 0"),
    "negative: replicas": ({"workers": {"replicas": -1}}, "should be greater than or equal to 1"),
    "negative: restarts": ({"runPolicy": {"maxRestarts": -1}}, "should be greater than or equal to 0"),
    "negative: resources": (
        {"workers": {"resources": {"limits": {"cpu": -1}}}},
        "write a quantity that is not negative, such as 4, 500m, 512Mi or 64Gi",
    ),
    "fraction above one": ({"dataset": {"maxInvalidFraction": 1.5}}, "should be less than or equal to 1"),
    "epochs and maxSteps": (
        {"training": {"epochs": 1, "maxSteps": 5}},
        "training.epochs and training.maxSteps exclude each other: remove one",
    ),
    "gpus and processes": (
        {"workers": {"processesPerWorker": 2}},
        "workers.gpusPerWorker and workers.processesPerWorker exclude each other",
    ),
    "neither gpus nor processes": (
        {"workers": {"gpusPerWorker": None}},
        "workers: give gpusPerWorker, or processesPerWorker to train on CPU",
    ),
    "unknown field": ({"optimiser": "adam"}, 'unknown field "spec.optimiser"'),
    "unknown nested field": ({"training": {"lr": 1}}, 'unknown field "spec.training.lr"'),
    "unknown method": ({"method": {"full": None, "prefix": {}}}, 'unknown field "spec.method.prefix"'),
    "no method": ({"method": {"full": None}}, "method: set exactly one of full, lora and qlora"),
    "two methods": ({"method": {"lora": {}}}, "method: set exactly one of full, lora and qlora"),
    "unknown layer": (lora(targetModules=["wq"]), 'supported values: "q_proj", "k_proj"'),
    "a layer twice": (lora(targetModules=["q_proj", "q_proj"]), 'Duplicate value: "q_proj"'),
    "no layer": (lora(targetModules=[]), "should have at least 1 items"),
    "rank": (lora(r=0), "should be greater than or equal to 1"),
    "dropout": (lora(dropout=1), "should be less than 1"),
    "dora with stage 3": (
        {**lora(dora=True), "deepspeed": {"stage": 3}},
        "dora needs the norms of whole weights, which ZeRO-3 has cut into pieces",
    ),
    "dora with the stage of 51B": (
        {**lora(dora=True), "model": {"size": "51B"}},
        "set deepspeed.stage to 2, or dora to false",
    ),
    "qlora with stage 3": (
        {**QLORA, "deepspeed": {"stage": 3}},
        "ZeRO-3 cannot cut 4-bit weights into pieces; set deepspeed.stage to 2",
    ),
    "qlora in fp32": (
        {**QLORA, "training": {"precision": "fp32"}},
        "method.qlora computes in bf16; set training.precision to bf16",
    ),
    "nothing to merge": (
        {"output": {"mergeAdapter": True}},
        "output.mergeAdapter: method.full trains no adapter",
    ),
    "fp16": (
        {"training": {"precision": "fp16"}},
        "write one of bf16, fp32: fp16 cannot train Yuan 2.0: its weights are bf16, whose range fp16",
    ),
    "ratio and steps of the warm-up": (
        {"training": {"warmupRatio": 0.1, "warmupSteps": 5}},
        "training: warmupRatio and warmupSteps exclude each other; leave one out",
    ),
    "checkpointing of no layer": (
        {"training": {"gradientCheckpointing": False, "gradientCheckpointingEvery": 2}},
        "gradientCheckpointing is false, no layer is computed again",
    ),
    "fp32 gradients without ZeRO": (
        {"training": {"fp32Gradients": True}, "deepspeed": {"stage": 0}},
        "without ZeRO, DeepSpeed adds bf16 gradients up in bf16; set deepspeed.stage to 2",
    ),
    "offload of parameters without stage 3": (
        {"deepspeed": {"offload": "parameters"}},
        "only with ZeRO-3, which 51B and 102B have by default; set deepspeed.stage to 3",
    ),
    "offload without stage": (
        {"deepspeed": {"offload": "optimizer", "stage": 0}},
        "without ZeRO there is no optimizer state to offload",
    ),
    "offload with the stage of qlora": (
        {**QLORA, "deepspeed": {"offload": "optimizer"}},
        "without ZeRO there is no optimizer state to offload; set deepspeed.stage to 2",
    ),
    "wrong type: overrides": ({"deepspeed": {"overrides": "ds.json"}}, "must be of type object"),
    "two kinds of held-out data": (
        {"dataset": {"evalFraction": 0.1, "evalSource": HELD_OUT}},
        "dataset: evalFraction and evalSource exclude each other; leave one out",
    ),
    "two sources of held-out data": (
        {"dataset": {"evalSource": {**HELD_OUT, "persistentVolumeClaim": {"claimName": "a", "path": "b"}}}},
        "dataset.evalSource: name exactly one of persistentVolumeClaim and configMap",
    ),
    "everything held out": ({"dataset": {"evalFraction": 1}}, "should be less than 1"),
    "early stopping by nothing": (
        {"evaluation": {"earlyStoppingPatience": 3}},
        "data that is held out of training; set dataset.evalFraction or dataset.evalSource",
    ),
    "evaluation on nothing": (
        {"evaluation": {"everySteps": 10}},
        "data that is held out of training; set dataset.evalFraction or dataset.evalSource",
    ),
    "no data": ({"dataset": None}, "spec.dataset: Required value"),
    "no path": ({"dataset": DATA_PATH}, "path: Required value"),
    "two sources of data": (
        {"dataset": {"source": {"configMap": {"name": "a", "key": "b"}}}},
        "dataset.source: name exactly one of persistentVolumeClaim and configMap",
    ),
    "shared memory": ({"workers": {"sharedMemory": "lots"}}, "write a quantity that is not negative"),
    "gpus as a resource": (
        {"workers": {"resources": {"limits": {"nvidia.com/gpu": 1}}}},
        "ask for GPUs with gpusPerWorker instead of nvidia.com/gpu",
    ),
    "another vendor's gpus as a resource": (
        {"workers": {"gpuResource": "amd.com/gpu", "resources": {"limits": {"amd.com/gpu": 1}}}},
        "workers.gpusPerWorker asks for what gpuResource names",
    ),
    "several MIG slices": (
        {
            "workers": {
                "processesPerWorker": None,
                "gpusPerWorker": 2,
                "gpuResource": "nvidia.com/mig-1g.10gb",
            }
        },
        "set gpusPerWorker to 1",
    ),
    "a gpu resource without a vendor": ({"workers": {"gpuResource": "gpu"}}, "gpuResource"),
    "a template that is no object": ({"workers": {"podTemplate": {"spec": []}}}, "must be of type object"),
    "reserved variable": (
        {"workers": {"env": [{"name": "MASTER_ADDR", "value": "x"}]}},
        "are set by the operator; remove them",
    ),
    "variable with two values": (
        {"workers": {"env": [{"name": "A", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]}},
        "an environment variable has either value or valueFrom: remove one",
    ),
    "variable from nowhere": (
        {"workers": {"env": [{"name": "A", "valueFrom": {}}]}},
        "valueFrom: name exactly one of secretKeyRef, configMapKeyRef and fieldRef",
    ),
    "variable twice": (
        {"workers": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}},
        "Duplicate value",
    ),
    "toleration": ({"workers": {"tolerations": [{"operator": "Near"}]}}, 'values: "Exists", "Equal"'),
    "affinity": ({"workers": {"affinity": {"nodeAffinty": {}}}}, "unknown field"),
    "output over the model": (
        {"output": {"persistentVolumeClaim": {"path": "yuan2-2b"}}},
        "the path holds the model that training starts from and would overwrite it",
    ),
    "output around the model": (
        {"output": {"persistentVolumeClaim": {"path": "."}}},
        "choose another path or claim",
    ),
}


@pytest.mark.parametrize(("spec", "sentence"), BAD_FINETUNES.values(), ids=BAD_FINETUNES)
def test_a_bad_finetune_is_refused_with_a_sentence(api, spec, sentence):
    assert sentence in refused(api, FINETUNE, spec)


@pytest.mark.parametrize("path", ["/data", "data/", "../data", "a/../b", "a//b", "./a", ".."])
def test_a_path_that_leaves_its_claim_is_refused(api, path):
    source = {"persistentVolumeClaim": {"path": path}}
    said = refused(api, FINETUNE, {"dataset": {"source": source}})
    assert "path is relative to the root of the claim and stays inside it" in said


@pytest.mark.parametrize("base", [FINETUNE, SERVICE], ids=["finetune", "service"])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a" * 41, "metadata.name may have at most 40 characters"),
        ("1st", "metadata.name must begin with a letter"),
        ("a.b", "have only a-z, 0-9 and '-'"),
    ],
)
def test_a_name_that_pods_and_services_cannot_have_is_refused(api, base, name, sentence):
    assert sentence in refused(api, base, {}, name=name)


BAD_SERVICES = {
    "two models": (
        {"model": {"source": {"persistentVolumeClaim": {"claimName": "m", "path": "p"}}}},
        "model: name exactly one of fineTuneRef (a Yuan2FineTune) and source (a model directory)",
    ),
    "no model": ({"model": {"fineTuneRef": None}}, "model: name exactly one of fineTuneRef"),
    "wrong enum: precision": ({"worker": {"precision": "int3"}}, 'supported values: "bf16", "fp16", "fp32"'),
    "wrong enum: dispatch": ({"controller": {"dispatch": "random"}}, '"shortest_queue", "lottery"'),
    "negative: replicas": ({"worker": {"replicas": -1}}, "should be greater than or equal to 0"),
    "negative: gpus": ({"worker": {"gpusPerWorker": -1}}, "should be greater than or equal to 0"),
    "privileged port": ({"api": {"port": 80}}, "should be greater than or equal to 1024"),
    "wrong type: web": ({"web": {"enabled": "true"}}, "must be of type boolean"),
    "unknown field": ({"wroker": {}}, 'unknown field "spec.wroker"'),
    "wrong enum: engine": ({"worker": {"engine": "tgi"}}, '"auto", "vllm", "builtin"'),
    "several gpus, builtin": (
        {"worker": {"engine": "builtin", "gpusPerWorker": 2}},
        "worker.gpusPerWorker: the built-in engine computes on one GPU; set worker.engine: vllm",
    ),
    "quantization, builtin": (
        {"worker": {"quantization": "fp8"}},
        "worker.quantization: the built-in engine has none; set worker.engine: vllm",
    ),
    "prefixes, builtin": (
        {"worker": {"engine": "builtin", "gpusPerWorker": 1, "prefixCaching": False}},
        "worker.prefixCaching: the built-in engine has none; set worker.engine: vllm",
    ),
    "engine arguments, builtin": (
        {"worker": {"engineArgs": {"block-size": "32"}}},
        "worker.engineArgs: the built-in engine has none; set worker.engine: vllm",
    ),
    "memory of GPUs without them": (
        {"worker": {"engine": "vllm", "gpuMemoryUtilization": 0.5}},
        "worker.gpuMemoryUtilization: only vLLM on GPUs takes a share of their memory",
    ),
    "an argument with a field": (
        {"worker": {"engine": "vllm", "engineArgs": {"max-model-len": "64"}}},
        "engineArgs: max-model-len is set by worker.maxModelLength; use that field",
    ),
    "an argument that is not supported": (
        {"worker": {"engine": "vllm", "engineArgs": {"speculative-config": "{}"}}},
        "engineArgs: speculative-config is not supported: Yuan 2.0 cannot take back its filter's state",
    ),
    "adapters, builtin": (
        {"model": {"adapters": [ADAPTER]}},
        "model.adapters: the built-in engine has none; set worker.engine: vllm",
    ),
    "an adapter with the model's name": (
        {"worker": {"engine": "vllm"}, "model": {"adapters": [ADAPTER | {"name": "yuan2"}]}},
        "model.adapters: an adapter needs a name that the model does not have",
    ),
    "an argument with dashes": (
        {"worker": {"engine": "vllm", "engineArgs": {"--block-size": "32"}}},
        "engineArgs: write the options of vLLM's command line without the dashes in front",
    ),
    "gpus as a resource": (
        {"worker": {"resources": {"requests": {"nvidia.com/gpu": 1}}}},
        "ask for GPUs with gpusPerWorker instead of nvidia.com/gpu",
    ),
}


@pytest.mark.parametrize(("spec", "sentence"), BAD_SERVICES.values(), ids=BAD_SERVICES)
def test_a_bad_service_is_refused_with_a_sentence(api, spec, sentence):
    assert sentence in refused(api, SERVICE, spec)


# --- what may change ---------------------------------------------------------------------------------------


@pytest.fixture
def started(api) -> Iterator[str]:
    """A FineTune whose first attempt was made."""
    name = "started"
    made = copy.deepcopy(FINETUNE)
    made["metadata"]["name"] = name
    api.kubectl("create", "-f", "-", input=json.dumps(made))
    patch_status(api, name, {"attempt": 1})
    yield name
    api.kubectl("delete", "-n", NAMESPACE, "y2ft", name)


def patch_status(api: Any, name: str, status: dict[str, Any]) -> None:
    """Write status as the operator does."""
    body = json.dumps({"status": status})
    api.kubectl("patch", "-n", NAMESPACE, "y2ft", name, "--subresource=status", "--type=merge", "-p", body)


def change(api: Any, name: str, spec: dict[str, Any]) -> str:
    """Change the spec as a user does, without keeping it."""
    body = json.dumps({"spec": spec})
    said: str = api.kubectl(
        "patch", "-n", NAMESPACE, "y2ft", name, "--dry-run=server", "--type=merge", "-p", body
    )
    return said


CHANGES = {
    "model": {"model": {"size": "51B"}},
    "dataset": {"dataset": {"format": "alpaca"}},
    "training": {"training": {"learningRate": 1e-4}},
    "method": {"method": {"full": None, "lora": {}}},
    "deepspeed": {"deepspeed": {"stage": 3}},
    "output": {"output": {"persistentVolumeClaim": {"path": "elsewhere"}}},
}


@pytest.mark.parametrize(("section", "spec"), CHANGES.items(), ids=CHANGES)
def test_what_checkpoints_depend_on_is_fixed_once_training_has_begun(api, started, section, spec):
    with pytest.raises(ClusterError, match=f"spec.{section} cannot change once training has begun"):
        change(api, started, {**spec, "runPolicy": {"suspend": True}})


def test_overrides_are_fixed_with_the_rest(api, started):
    with pytest.raises(ClusterError, match=r"spec\.deepspeed cannot change once training has begun"):
        change(api, started, {"deepspeed": {"overrides": {"zero_optimization": {"overlap_comm": True}}}})


@pytest.mark.parametrize(
    "spec",
    [
        {"workers": {"replicas": 2}},
        {"workers": {"gpusPerWorker": None, "processesPerWorker": 8}},
        {"workers": {"gpusPerWorker": 4}, "training": {"gradientAccumulationSteps": 8}},
        {"training": {"microBatchSize": 1, "packing": False, "tf32": False, "gradientCheckpointing": False}},
    ],
)
def test_ranks_and_how_they_share_a_step_may_change_while_there_are_none(api, started, spec):
    with pytest.raises(ClusterError, match=r"can change only while spec\.runPolicy\.suspend is true"):
        change(api, started, spec)
    assert "patched" in change(api, started, {**spec, "runPolicy": {"suspend": True}})


@pytest.mark.parametrize("field", [{"warmupSteps": 3}, {"epochs": 9}, {"seed": 1}, {"precision": "fp32"}])
def test_what_is_learned_is_fixed_field_by_field(api, started, field):
    with pytest.raises(ClusterError, match=r"spec\.training cannot change once training has begun, but for"):
        change(api, started, {"training": field, "runPolicy": {"suspend": True}})


@pytest.mark.parametrize(
    ("section", "spec"),
    [
        ("workers", {"image": "other"}),
        ("checkpoint", {"everySteps": 7}),
        ("evaluation", {"sampleAnswers": 0}),
    ],
    ids=["workers", "checkpoint", "evaluation"],
)
def test_pods_may_change_only_while_there_are_none(api, started, section, spec):
    with pytest.raises(ClusterError, match=f"spec.{section} can change only while spec.runPolicy.suspend"):
        change(api, started, {section: spec})
    assert "patched" in change(api, started, {section: spec, "runPolicy": {"suspend": True}})


def test_limits_and_suspend_may_change_at_any_time(api, started):
    policy = {"suspend": True, "maxRestarts": 9, "stallTimeoutSeconds": 5, "activeDeadlineSeconds": 60}
    assert "patched" in change(api, started, {"runPolicy": policy})


def test_before_training_everything_may_be_corrected(api, started):
    patch_status(api, started, {"attempt": None})
    everything = {key: value for spec in CHANGES.values() for key, value in spec.items()}
    assert "patched" in change(api, started, {**everything, "workers": {"replicas": 2}})


# --- what tools see ----------------------------------------------------------------------------------------


def test_short_names_category_columns_and_scale(api):
    api.kubectl("create", "-f", "-", input=json.dumps(SERVICE))
    columns = api.kubectl("get", "-n", NAMESPACE, "y2svc").split()
    assert columns[:5] == ["NAME", "MODEL", "READY", "URL", "WORKERS"]
    assert "yuan2service.yuan2.dev/alpaca" in api.kubectl("get", "-n", NAMESPACE, "yuan2", "-o", "name")
    api.kubectl("scale", "-n", NAMESPACE, "y2svc/alpaca", "--replicas=3")
    got = api.kubectl("get", "-n", NAMESPACE, "y2svc/alpaca", "-o", "jsonpath={.spec.worker.replicas}")
    assert got == "3"


def test_a_finetune_prints_its_progress(api, started):
    status = {
        "method": "full",
        "phase": "Running",
        "progress": "840/3621",
        "loss": 1.204,
        "eta": "58m",
        "attempt": 2,
        "restarts": 0,
    }
    patch_status(api, started, status)
    [head, row] = api.kubectl("get", "-n", NAMESPACE, "y2ft", started).splitlines()
    columns = "NAME MODEL METHOD PHASE STEP LOSS ETA ATTEMPT RESTARTS AGE"
    assert head.split() == columns.split()
    assert row.split()[:9] == [started, "2B", "full", "Running", "840/3621", "1.204", "58m", "2", "0"]


def test_a_wide_list_shows_what_was_measured(api, started):
    status = {"evalLoss": 1.31, "tokensPerSecond": 52000, "mfu": 0.41, "peakMemory": "39G"}
    patch_status(api, started, status)
    [head, row] = api.kubectl("get", "-n", NAMESPACE, "y2ft", started, "-o", "wide").splitlines()
    columns = {
        name: row[head.index(name) :].split()[0] for name in ("EVAL LOSS", "TOKENS/S", "MFU", "MEMORY")
    }
    assert columns == {"EVAL LOSS": "1.31", "TOKENS/S": "52000", "MFU": "0.41", "MEMORY": "39G"}


@pytest.mark.parametrize("field", ["yuan2finetune.spec.training", "yuan2service.spec.worker"])
def test_kubectl_explain_describes_every_field(api, field):
    assert "DESCRIPTION" in api.kubectl("explain", field)
