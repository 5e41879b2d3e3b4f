"""One pass over one resource: observe, decide, apply, write the status once, tell."""

from __future__ import annotations

import time

from yuan2_operator.constants import KIND_FINETUNE, KIND_SERVICE
from yuan2_operator.logs import about
from yuan2_operator.metrics import RECONCILE_SECONDS, RECONCILES
from yuan2_operator.queue import Key
from yuan2_operator.reconcile.context import Context
from yuan2_operator.reconcile.finetune import FineTuneReconciler
from yuan2_operator.reconcile.service import ServiceReconciler


class Reconciler:
    """Sends a key to the reconciler of its kind."""

    def __init__(self, context: Context) -> None:
        self._by_kind = {
            KIND_FINETUNE: FineTuneReconciler(context).reconcile,
            KIND_SERVICE: ServiceReconciler(context).reconcile,
        }

    async def __call__(self, key: Key) -> float | None:
        """One pass; gives the seconds after which the next one is wanted, or None."""
        began, result = time.monotonic(), "error"
        try:
            with about(kind=key.kind, namespace=key.namespace, name=key.name):
                delay = await self._by_kind[key.kind](key)
            result = "ok"
            return delay
        finally:
            RECONCILES.labels(kind=key.kind, result=result).inc()
            RECONCILE_SECONDS.labels(kind=key.kind).observe(time.monotonic() - began)
