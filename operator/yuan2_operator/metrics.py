"""What the operator counts about itself, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

API_REQUESTS = Counter(
    "yuan2_operator_api_requests",
    "Requests to the Kubernetes API server, watches not counted.",
    ["verb", "resource"],
)
RECONCILES = Counter(
    "yuan2_operator_reconciles",
    "Passes over one resource.",
    ["kind", "result"],
)
RECONCILE_SECONDS = Histogram(
    "yuan2_operator_reconcile_seconds",
    "Duration of a pass over one resource.",
    ["kind"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10),
)
RESTARTS = Counter(
    "yuan2_finetune_restarts", "Attempts that failed and count against maxRestarts.", ["namespace", "reason"]
)
DISRUPTIONS = Counter(
    "yuan2_finetune_disruptions",
    "Attempts that ended through nobody's fault.",
    ["namespace", "reason"],
)
GPU_SECONDS = Counter(
    "yuan2_finetune_gpu_seconds",
    "Seconds for which pods held GPUs, times their number.",
    ["namespace", "label"],
)
LEADER = Gauge("yuan2_operator_leader", "1 in the replica that holds the Lease and works.")
QUEUE_LENGTH = Gauge("yuan2_operator_queue_length", "Resources that wait for a pass.")
