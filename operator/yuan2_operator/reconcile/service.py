"""One pass over a Yuan2Service."""

from __future__ import annotations

import logging

from yuan2_operator.api.finetune import FineTuneStatus
from yuan2_operator.api.schema import rfc3339
from yuan2_operator.api.service import ServiceSpec, ServiceStatus
from yuan2_operator.apply import Occupied, key_of
from yuan2_operator.cache import Object
from yuan2_operator.client import (
    CHILD_RESOURCES,
    DEPLOYMENTS,
    FINETUNES,
    PODS,
    YUAN_SERVICES,
    Forbidden,
    Invalid,
)
from yuan2_operator.constants import KIND_FINETUNE, KIND_SERVICE, Reason
from yuan2_operator.manifests.service import obsolete, service_manifests
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.references import Rejection
from yuan2_operator.plan.service import ServicePlan, plan_service, references, served_model
from yuan2_operator.queue import Key
from yuan2_operator.reconcile.context import Context, read_status
from yuan2_operator.reconcile.refusal import read_spec
from yuan2_operator.status.events import condition_events
from yuan2_operator.status.schedule import TROUBLE_SECONDS
from yuan2_operator.status.service import ServiceObservation, is_settled, service_status

logger = logging.getLogger(__name__)

_MADE = ("ConfigMap", "Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment")
"""Kinds of a service's children, in the order in which they are removed."""


class ServiceReconciler:
    """Keeps nothing between passes."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def reconcile(self, key: Key) -> float | None:
        """Decide, apply, observe, write the status, tell; gives the seconds to the next look."""
        body = self._context.cache.itself(YUAN_SERVICES.plural, key)
        if body is None or "deletionTimestamp" in body["metadata"]:
            return None
        owner = Owner.of({"kind": KIND_SERVICE, **body})
        reading = await read_spec(self._context, YUAN_SERVICES, ServiceSpec, owner, body)
        if reading is None:
            return None
        spec = reading.spec
        prior, before = read_status(ServiceStatus, body)
        decision = await self._decide(owner, spec, prior)
        decision = await self._apply(owner, decision)
        status = service_status(owner, spec, decision, self._observe(owner), prior, now=self._context.clock())
        await self._clean_up(owner, decision, status)
        if status != prior:
            await self._context.write_status(YUAN_SERVICES, owner, before, status.to_api())
            await self._context.tell(owner, condition_events(prior.conditions, status.conditions))
        return _next_look(decision, self._context.settings.missing_seconds)

    async def _decide(self, owner: Owner, spec: ServiceSpec, prior: ServiceStatus) -> ServicePlan | Rejection:
        finetune = self._finetune(owner, spec)
        wanted = references(spec, served_model(spec, prior, finetune))
        missing = await self._context.observer.missing(owner.namespace, wanted)
        return plan_service(
            owner,
            spec,
            prior,
            finetune=finetune,
            missing=missing,
            default_image=self._context.settings.serve_image,
            default_vllm_image=self._context.settings.serve_vllm_image,
            privileges=self._context.settings.pod_privileges,
        )

    def _finetune(self, owner: Owner, spec: ServiceSpec) -> FineTuneStatus | None:
        reference = spec.model.fine_tune_ref
        if reference is None:
            return None
        key = Key(KIND_FINETUNE, owner.namespace, reference.name)
        body = self._context.cache.itself(FINETUNES.plural, key)
        return None if body is None else read_status(FineTuneStatus, body)[0]

    async def _apply(self, owner: Owner, decision: ServicePlan | Rejection) -> ServicePlan | Rejection:
        """Have the children exist; what the cluster refuses becomes the sentence of `Accepted`."""
        if isinstance(decision, Rejection):
            return decision
        try:
            await self._context.applier.ensure(owner, service_manifests(decision))
        except (Occupied, Forbidden, Invalid) as error:
            logger.warning("%s/%s: %s", owner.namespace, owner.name, error)
            return Rejection(
                Reason.RECONCILE_FAILED, f"the cluster refused an object of the service: {error}"
            )
        return decision

    async def _clean_up(self, owner: Owner, decision: ServicePlan | Rejection, status: ServiceStatus) -> None:
        if isinstance(decision, Rejection):
            return
        existing = {
            (kind, child["metadata"]["name"])
            for kind in _MADE
            for child in self._context.cache.of(CHILD_RESOURCES[kind].plural, key_of(owner))
        }
        now = rfc3339(self._context.clock())
        for child in obsolete(decision, existing, settled=is_settled(status)):
            await self._context.applier.remove(owner, child.kind, child.name, now)

    def _deployments(self, owner: Owner) -> list[Object]:
        return self._context.cache.of(DEPLOYMENTS.plural, key_of(owner))

    def _observe(self, owner: Owner) -> ServiceObservation:
        pods = self._context.cache.of(PODS.plural, key_of(owner))
        return ServiceObservation({d["metadata"]["name"]: d for d in self._deployments(owner)}, pods)


def _next_look(decision: ServicePlan | Rejection, missing_seconds: float) -> float | None:
    if isinstance(decision, ServicePlan):
        return None
    by_event = (Reason.FINETUNE_NOT_FOUND, Reason.FINETUNE_NOT_COMPLETE, Reason.FINETUNE_FAILED)
    if decision.reason in by_event:
        # The FineTune is watched: its next change brings this service back.
        return None
    return TROUBLE_SECONDS if decision.reason == Reason.RECONCILE_FAILED else missing_seconds
