"""The steps of the demo on a cluster that is there: each waits with words, and fails with a sentence."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import install, status
from .errors import DemoError
from .kubectl import Kubectl, Reader
from .questions import Answer, Score, ask_all, load_records, questions, showcase
from .terminal import Terminal, seconds

POLL_SECONDS = 1.0
NAMESPACE_SECONDS = 120.0
OPERATOR_SECONDS = 180.0
BASE_SECONDS = 300.0
TRAINING_SECONDS = 1800.0
SERVICE_SECONDS = 300.0
CONNECT_SECONDS = 2.0
SHOWN = 10
"""Questions and answers printed of all that are asked."""
SHOWN_WRONG = 5

_CORE = f"/api/v1/namespaces/{install.NAMESPACE}"
_YUAN2 = f"/apis/yuan2.dev/v1alpha1/namespaces/{install.NAMESPACE}"
_FINETUNE = f"{_YUAN2}/yuan2finetunes/{install.NAME}"
_SERVICE = f"{_YUAN2}/yuan2services/{install.NAME}"
_BASE_JOB = f"/apis/batch/v1/namespaces/{install.NAMESPACE}/jobs/{install.NAME}-base"
_OPERATOR = f"/apis/apps/v1/namespaces/{install.OPERATOR_NAMESPACE}/deployments/{install.OPERATOR}"
_PROGRESS_PORT = 9390


@dataclass(frozen=True)
class Session:
    """What every step needs."""

    kubectl: Kubectl
    reader: Reader
    terminal: Terminal

    def pods(self, selector: str = "", namespace: str = install.NAMESPACE) -> list[dict[str, Any]]:
        """Pods of a namespace that carry the labels, oldest first."""
        found = self.reader.get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}") or {}
        return sorted(found.get("items", []), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def wait(self, what: str, limit: float, look: str, poll: Callable[[], str | None]) -> None:
        """Poll until None comes back; a string is what is still missing, shown and, at the limit, raised."""
        deadline = time.monotonic() + limit
        while (missing := poll()) is not None:
            if time.monotonic() > deadline:
                raise DemoError(f"{what} after {seconds(limit)}: {missing}", look=look)
            self.terminal.live(missing)
            time.sleep(POLL_SECONDS)


def install_operator(session: Session, images: Mapping[str, str], *, keep_foreign: bool) -> None:
    """CRDs, RBAC and the Deployment; an operator that somebody else installed is used as it is."""
    session.terminal.step("operator: CRDs, RBAC and a Deployment in yuan2-system")
    there = session.reader.get(_OPERATOR)
    if keep_foreign and there and not install.installed_by_demo(there):
        session.terminal.done("already installed by somebody else, used as it is")
        return
    overlay = install.write_overlay("operator", install.operator_overlay(images))
    session.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(overlay))

    def missing() -> str | None:
        deployment = session.reader.get(_OPERATOR) or {}
        state = deployment.get("status", {})
        if state.get("observedGeneration") == deployment.get("metadata", {}).get("generation"):
            replicas = state.get("replicas", 0)
            if replicas and replicas == state.get("updatedReplicas") == state.get("availableReplicas"):
                return None
        pods = status.pods_line(session.pods(namespace=install.OPERATOR_NAMESPACE))
        return f"waiting for the operator's pod: {pods or 'not created yet'}"

    look = f"kubectl -n {install.OPERATOR_NAMESPACE} describe pods"
    session.wait("the operator is not available", OPERATOR_SECONDS, look, missing)
    session.terminal.done("available")


def fresh_namespace(session: Session) -> None:
    """Remove what an earlier demo left, then create the namespace. Raises DemoError when it is not ours."""
    there = session.reader.get(_CORE)
    if there and not install.installed_by_demo(there):
        raise DemoError(
            f"namespace {install.NAMESPACE} exists and is not the demo's: rename or delete it",
            look=f"kubectl get namespace {install.NAMESPACE} --show-labels",
        )
    if remove_namespace(session.kubectl, session.reader):

        def missing() -> str | None:
            return "removing the earlier demo" if session.reader.get(_CORE) else None

        look = f"kubectl get namespace {install.NAMESPACE} -o yaml"
        session.wait("the earlier demo is still being removed", NAMESPACE_SECONDS, look, missing)
    session.kubectl("apply", "-f", str(install.write_manifest("namespace", install.namespace())))


def remove_namespace(kubectl: Kubectl, reader: Reader) -> bool:
    """Begin to delete the demo's namespace; False when there is none that carries the demo's label."""
    if not install.installed_by_demo(reader.get(_CORE)):
        return False
    kubectl("delete", "namespace", install.NAMESPACE, "--wait=false", "--ignore-not-found")
    return True


def make_base(session: Session, images: Mapping[str, str]) -> None:
    """Claims, data and the random base model."""
    conversations = len(load_records(install.CONVERSATIONS))
    session.terminal.step(
        f"examples/identity: claims, {conversations} conversations, a small random Yuan 2.0"
    )
    fresh_namespace(session)
    overlay = install.write_overlay("example", install.example_overlay(images))
    session.kubectl("apply", "-k", str(overlay))
    look = f"kubectl -n {install.NAMESPACE} logs job/{install.NAME}-base"

    def missing() -> str | None:
        job = session.reader.get(_BASE_JOB) or {}
        if status.is_true(job, "Complete"):
            return None
        if status.is_true(job, "Failed"):
            raise DemoError(f"the base model was not made: {status.sentence(job)}", look=look)
        pods = status.pods_line(session.pods())
        return f"waiting for the base model: {pods or 'pod not created yet'}"

    session.wait("the base model is not made", BASE_SECONDS, look, missing)
    session.terminal.done(
        _last_line(session.kubectl("logs", "-n", install.NAMESPACE, f"job/{install.NAME}-base"))
    )


def train(session: Session) -> status.Training:
    """Apply the Yuan2FineTune and follow it to the end."""
    session.terminal.step("kubectl apply -f finetune.yaml: 2 pods, DeepSpeed ZeRO-2 over gloo")
    session.kubectl("apply", "-n", install.NAMESPACE, "-f", str(install.EXAMPLE / "finetune.yaml"))
    look = f"kubectl -n {install.NAMESPACE} describe y2ft {install.NAME}"
    deadline = time.monotonic() + TRAINING_SECONDS
    seen = status.Training("pending")
    while True:
        finetune = session.reader.get(_FINETUNE) or {}
        if status.is_true(finetune, "Complete"):
            break
        if status.is_true(finetune, "Failed"):
            raise DemoError(f"the training failed: {status.sentence(finetune)}", look=look)
        if time.monotonic() > deadline:
            raise DemoError(
                f"not trained after {seconds(TRAINING_SECONDS)}: {_training_words(session, finetune)}", look
            )
        seen = status.furthest(seen, status.training(finetune, _rank0_progress(session)))
        if seen.total:
            session.terminal.live(status.bar(seen), key=str(int(seen.share * 10)))
        else:
            session.terminal.live(_training_words(session, finetune))
        time.sleep(POLL_SECONDS)
    return _trained(session, finetune, seen)


def _trained(session: Session, finetune: Mapping[str, Any], seen: status.Training) -> status.Training:
    final = status.training(finetune, None)
    run = status.Training(
        "complete",
        final.step,
        final.total,
        final.loss if final.loss is not None else seen.loss,
        final.tokens_per_second or seen.tokens_per_second,
    )
    loss = f", loss {run.loss:.4f}" if run.loss is not None else ""
    speed = f", {run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else ""
    session.terminal.done(f"complete: {run.step} steps{loss}{speed}")
    return run


def _rank0_progress(session: Session) -> Any:
    selector = f"yuan2.dev/finetune={install.NAME},batch.kubernetes.io/job-completion-index=0"
    pods = session.pods(selector)
    if not pods or pods[-1].get("status", {}).get("phase") != "Running":
        return None
    return session.reader.get(f"{_CORE}/pods/{pods[-1]['metadata']['name']}:{_PROGRESS_PORT}/proxy/progress")


def _training_words(session: Session, finetune: Mapping[str, Any]) -> str:
    pods = status.pods_line(session.pods(f"yuan2.dev/finetune={install.NAME}"))
    said = status.sentence(finetune)
    return (
        "; ".join(part for part in (said, pods) if part)
        or "waiting for the operator to accept the Yuan2FineTune"
    )


def serve(session: Session) -> dict[str, Any]:
    """Apply the Yuan2Service and wait until it is Ready; returns the resource."""
    session.terminal.step("kubectl apply -f service.yaml: FastChat controller, model worker, OpenAI API")
    session.kubectl("apply", "-n", install.NAMESPACE, "-f", str(install.EXAMPLE / "service.yaml"))

    def missing() -> str | None:
        service = session.reader.get(_SERVICE) or {}
        if status.is_true(service, "Ready"):
            return None
        pods = status.pods_line(session.pods(f"yuan2.dev/service={install.NAME}"))
        return (
            "; ".join(part for part in (status.sentence(service), pods) if part) or "waiting for the operator"
        )

    look = f"kubectl -n {install.NAMESPACE} describe y2svc {install.NAME}"
    session.wait("the service is not ready", SERVICE_SECONDS, look, missing)
    service: dict[str, Any] = session.reader.get(_SERVICE) or {}
    session.terminal.done(f"ready at {service.get('status', {}).get('url', 'its Service')}")
    return service


@contextmanager
def reach(session: Session) -> Iterator[str]:
    """The API's base URL from here: the Service's cluster IP where it answers, else a port-forward."""
    name = f"{install.NAME}-api"
    spec = (session.reader.get(f"{_CORE}/services/{name}") or {}).get("spec")
    if not spec:
        raise DemoError(f"Service {name} is gone", look=f"kubectl -n {install.NAMESPACE} get services")
    address, port = spec["clusterIP"], int(spec["ports"][0]["port"])
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        with session.kubectl.port_forward(install.NAMESPACE, name, port) as url:
            yield f"{url}/v1"
        return
    yield f"http://{address}:{port}/v1"


def interview(session: Session, base_url: str) -> Score:
    """Ask every trained question and print some of the answers."""
    records = load_records(install.CONVERSATIONS)
    total = len(questions(records))
    session.terminal.step(f"asking {total} questions through the openai client at {base_url}")
    counts = {"asked": 0, "right": 0}

    def count(answer: Answer) -> None:
        counts["asked"] += 1
        counts["right"] += answer.verbatim
        tenth = counts["asked"] * 10 // total
        session.terminal.live(f"{counts['asked']}/{total} asked, {counts['right']} verbatim", key=str(tenth))

    score = ask_all(base_url, records, on_answer=count)
    session.terminal.done(f"{score.right} verbatim, {score.tokens_per_second:,.0f} answer tokens/s")
    for answer in showcase(score.answers, SHOWN):
        session.terminal.line(answer_lines(answer))
    if score.wrong:
        session.terminal.line(f"not verbatim ({min(len(score.wrong), SHOWN_WRONG)} of {len(score.wrong)}):")
        for answer in score.wrong[:SHOWN_WRONG]:
            session.terminal.line(answer_lines(answer) + f"\n      trained: {answer.question.expected!r}")
    return score


def answer_lines(answer: Answer) -> str:
    """Two lines for a reader; before a later question stand the earlier ones of its conversation."""
    asked = " … ".join(text for role, text in answer.question.history if role == "user")
    said = answer.error or answer.text.replace("\n", "\n        ")
    return f"    Q   {asked}\n    A {'✓' if answer.verbatim else '✗'} {said}"


def uninstall(kubectl: Kubectl, reader: Reader) -> str:
    """On a cluster that is not the demo's: remove the example, and the operator if the demo installed it.

    An operator that other namespaces use stays, since its CRDs would take their resources with them.
    """
    said = []
    if remove_namespace(kubectl, reader):
        said.append("the example is being removed")
    if not install.installed_by_demo(reader.get(_OPERATOR)):
        return "; ".join([*said, "the demo installed no operator here"])
    others = [
        f"{item['metadata']['namespace']}/{item['metadata']['name']}"
        for plural in ("yuan2finetunes", "yuan2services")
        for item in (reader.get(f"/apis/yuan2.dev/v1alpha1/{plural}") or {}).get("items", [])
        if item["metadata"]["namespace"] != install.NAMESPACE
    ]
    if others:
        return "; ".join([*said, f"the operator stays, it is used by {', '.join(others)}"])
    overlay = install.write_overlay(
        "operator", install.operator_overlay(dict.fromkeys(install.IMAGES, "unused"))
    )
    kubectl("delete", "-k", str(overlay), "--ignore-not-found")
    return "; ".join([*said, "the operator and its CRDs are removed"])


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "made"
