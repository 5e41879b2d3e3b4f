"""What kopf watches: the custom resources, and the children that carry our label."""

from __future__ import annotations

from yuan2_operator.client import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    FINETUNES,
    JOBS,
    NETWORK_POLICIES,
    PODS,
    SERVICES,
    YUAN_SERVICES,
)
from yuan2_operator.constants import FIELD_MANAGER, KIND_FINETUNE, KIND_SERVICE, LABEL_MANAGED_BY

OWNERS = {FINETUNES: KIND_FINETUNE, YUAN_SERVICES: KIND_SERVICE}
CHILDREN = (JOBS, PODS, DEPLOYMENTS, SERVICES, CONFIG_MAPS, DISRUPTION_BUDGETS, NETWORK_POLICIES)
WATCHED = (*OWNERS, *CHILDREN)
CHILD_SELECTOR = f"{LABEL_MANAGED_BY}={FIELD_MANAGER}"
"""The API server filters children: the operator never sees the cluster's other pods."""
