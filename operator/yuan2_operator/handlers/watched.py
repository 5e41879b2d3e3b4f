"""What kopf watches: the custom resources, and the children that carry our label."""

from __future__ import annotations

from collections.abc import Collection

from yuan2_operator.cache import Cache
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
    Client,
)
from yuan2_operator.constants import FIELD_MANAGER, KIND_FINETUNE, KIND_SERVICE, LABEL_MANAGED_BY

OWNERS = {FINETUNES: KIND_FINETUNE, YUAN_SERVICES: KIND_SERVICE}
CHILDREN = (JOBS, PODS, DEPLOYMENTS, SERVICES, CONFIG_MAPS, DISRUPTION_BUDGETS, NETWORK_POLICIES)
CHILD_SELECTOR = f"{LABEL_MANAGED_BY}={FIELD_MANAGER}"
"""The API server filters children: the operator never sees the cluster's other pods."""
SELECTORS = {**dict.fromkeys(OWNERS, ""), **dict.fromkeys(CHILDREN, CHILD_SELECTOR)}
WATCHED = tuple(SELECTORS)


async def audit(cache: Cache, client: Client, namespaces: Collection[str]) -> None:
    """Find out what vanished while a watch was broken, of every kind: a watch that begins anew does not tell.

    Raises:
        ApiError: a list failed; what was not listed stays as it was.
    """
    for resource, labels in SELECTORS.items():
        for namespace in namespaces or (None,):
            # Listed after the cache is read: what appears meanwhile is not taken for vanished.
            known = cache.uids(resource.plural, namespace)
            listed = await client.list_all(resource, namespace, labels)
            cache.hide(known - {obj["metadata"]["uid"] for obj in listed})
