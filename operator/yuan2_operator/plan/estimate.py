"""What a run will need, before a pod starts: memory of each GPU, hours, and whether it fits. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from yuan2_core.contract import Progress
from yuan2_core.estimate import Data, Estimate, Gpu, estimate_for_spec, find_gpu
from yuan2_core.sections import DEFAULT_EPOCHS, Training
from yuan2_operator.api.finetune import FineTuneSpec, FineTuneStatus, RunEstimate
from yuan2_operator.constants import GPU_PRODUCT_LABEL, Reason
from yuan2_operator.plan.finetune import launch, stage, summary
from yuan2_operator.plan.pod_template import node_selector
from yuan2_operator.plan.quantity import decimal_gigabytes


@dataclass(frozen=True)
class PreparedData:
    """What the trainer has made of the conversations."""

    samples: int
    tokens: int

    @classmethod
    def known(cls, prior: FineTuneStatus, progress: Progress | None) -> PreparedData | None:
        """As rank 0 says now or, when it does not, as it once said; None before the data were prepared."""
        now = (progress.samples, progress.tokens) if progress is not None else (0, 0)
        for samples, tokens in (now, (prior.samples, prior.tokens)):
            if samples and tokens:
                return cls(samples, tokens)
        return None


def gpu_of(spec: FineTuneSpec) -> Gpu | None:
    """The GPU whose product `workers.nodeSelector` names; None when it names none, or none that is known."""
    labels = node_selector(spec.workers.node_selector, spec.workers.pod_template)
    return find_gpu(labels.get(GPU_PRODUCT_LABEL, ""))


def estimate_of(spec: FineTuneSpec, prepared: PreparedData | None) -> Estimate | None:
    """The estimate for an accepted spec; None for a `custom` model, whose size is not known, and for CPUs."""
    return estimate_for_spec(
        size=spec.model.size,
        method=spec.method,
        training=_counted_in_sequences(spec),
        stage=stage(spec),
        launch=launch(spec),
        offload=spec.deepspeed.offload,
        gpu=gpu_of(spec),
        data=_data(spec, prepared),
    )


def acceptance(spec: FineTuneSpec, estimate: Estimate | None) -> tuple[str, str]:
    """Reason and sentence of `Accepted=True`: the plan and its needs, or what to change to fit."""
    plan = summary(spec)
    if estimate is None:
        return Reason.VALID, plan
    if estimate.advice:
        return Reason.UNLIKELY_TO_FIT, f"{plan}; warning: {estimate.advice}"
    return Reason.VALID, f"{plan}; {estimate.summary}"


def status_estimate(spec: FineTuneSpec, estimate: Estimate | None) -> RunEstimate | None:
    """The estimate as it stands in the status."""
    if estimate is None:
        return None
    gpu, host = gpu_of(spec), estimate.host_bytes_per_gpu
    return RunEstimate(
        gpu=gpu.name if gpu is not None else None,
        memory_per_gpu=decimal_gigabytes(estimate.memory_bytes_per_gpu),
        host_memory_per_gpu=decimal_gigabytes(host) if host else None,
        hours=None if estimate.hours is None else round(estimate.hours, 2),
        hours_at_most=estimate.at_most or None,
        fits=estimate.fits,
    )


def _counted_in_sequences(spec: FineTuneSpec) -> Training:
    """Hyperparameters whose batch counts sequences, where the objective's counts pairs of them."""
    micro = spec.training.micro_batch_size * spec.objective.sequences
    return spec.training.model_copy(update={"micro_batch_size": micro})


def _data(spec: FineTuneSpec, prepared: PreparedData | None) -> Data | None:
    if prepared is None:
        return None
    return Data(
        samples=prepared.samples,
        mean_tokens=prepared.tokens / prepared.samples,
        layout="packed" if spec.training.packing else "grouped",
        epochs=spec.training.epochs or DEFAULT_EPOCHS,
    )
