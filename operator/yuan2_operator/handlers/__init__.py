"""kopf's side of the operator: which objects are watched, and which custom resource an event is about.

kopf watches, lists again after a lost connection, and indexes; it writes nothing: no finalizer, no
annotation, no event. Handlers only put keys into the work queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import kopf

from yuan2_operator.cache import Object, slim
from yuan2_operator.client import YUAN_SERVICES, Resource
from yuan2_operator.constants import KIND_FINETUNE, KIND_SERVICE, LABEL_FINETUNE, LABEL_SERVICE
from yuan2_operator.handlers.machine import Machine
from yuan2_operator.handlers.watched import CHILD_SELECTOR, CHILDREN, OWNERS, WATCHED
from yuan2_operator.queue import Key


def source_of(resource: Resource, obj: Mapping[str, Any]) -> Key | None:
    """The custom resource that an object is, or belongs to; None if it is not one of ours."""
    metadata = obj["metadata"]
    if resource in OWNERS:
        return Key(OWNERS[resource], metadata["namespace"], metadata["name"])
    labels = metadata.get("labels", {})
    for label, kind in ((LABEL_FINETUNE, KIND_FINETUNE), (LABEL_SERVICE, KIND_SERVICE)):
        if label in labels:
            return Key(kind, metadata["namespace"], labels[label])
    return None


def index_entry(resource: Resource, obj: Mapping[str, Any]) -> dict[Key, Object] | None:
    """What an object is found by: its custom resource."""
    source = source_of(resource, obj)
    return None if source is None else {source: slim(obj)}


def build_registry(machine: Machine) -> kopf.OperatorRegistry:
    """The handlers of one operator."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(login)
    kopf.on.startup(registry=registry)(machine.start)
    for resource in WATCHED:
        _watch(registry, machine, resource)
    return registry


def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """Credentials of the pod's service account or, outside a cluster, of the kubeconfig."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def kopf_settings() -> kopf.OperatorSettings:
    """kopf as a watch engine that writes nothing."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    for resource in CHILDREN:
        settings.watching.label_selectors[kopf_selector(resource)] = CHILD_SELECTOR
    return settings


def kopf_selector(resource: Resource) -> tuple[str, str, str]:
    """A resource as kopf's decorators and settings name it."""
    return (resource.group, resource.version, resource.plural)


def _watch(registry: kopf.OperatorRegistry, machine: Machine, resource: Resource) -> None:
    @kopf.index(*kopf_selector(resource), id=resource.plural, registry=registry)
    def index(body: kopf.Body, **_: Any) -> dict[Key, Object] | None:
        return index_entry(resource, body)

    @kopf.on.event(*kopf_selector(resource), id=f"{resource.plural}-seen", registry=registry)
    async def seen(event: kopf.RawEvent, body: kopf.Body, **_: Any) -> None:
        machine.saw_an_event()
        source = source_of(resource, body)
        if source is None:
            return
        if event["type"] == "DELETED":
            machine.cache.forget(resource.plural, source, body["metadata"]["name"], body["metadata"]["uid"])
        for key in _keys(machine, source):
            machine.queue.add(key)


def _keys(machine: Machine, source: Key) -> Iterator[Key]:
    """The resource itself and, of a FineTune, the services that serve its model."""
    yield source
    if source.kind != KIND_FINETUNE:
        return
    for service in machine.cache.keys(YUAN_SERVICES.plural):
        if service.namespace == source.namespace and machine.serves(service, source.name):
            yield service
