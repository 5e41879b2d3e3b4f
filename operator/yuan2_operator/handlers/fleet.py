"""Metrics about the resources themselves, made of the cache and of what rank 0 pods last said, when they are
asked for.

Cardinality is bounded: per run there are series only while it trains, and for at most `RUNS_SHOWN` runs.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from yuan2_core.contract import Progress
from yuan2_operator.cache import Cache
from yuan2_operator.client import FINETUNES, YUAN_SERVICES
from yuan2_operator.queue import Key

RUNS_SHOWN = 1000
RUN_LABELS = ("namespace", "name")


@dataclass(frozen=True)
class Fleet(Collector):
    """Collects when Prometheus asks; only the replica that works knows the runs."""

    cache: Callable[[], Cache | None]
    words: Callable[[], Iterable[tuple[Key, Progress]]]
    """What the rank 0 pods that train have last said."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All families; they are there without resources, too."""
        yield self._phases("yuan2_finetunes", "Yuan2FineTunes by phase.", FINETUNES.plural)
        yield self._phases("yuan2_services", "Yuan2Services by phase.", YUAN_SERVICES.plural)
        yield from self._progress()

    def _phases(self, name: str, text: str, plural: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=("namespace", "phase"))
        cache, counts = self.cache(), Counts[tuple[str, str]]()
        for key in cache.keys(plural) if cache is not None else ():
            body = cache.itself(plural, key) if cache is not None else None
            if body is not None:
                counts[(key.namespace, body.get("status", {}).get("phase") or "Pending")] += 1
        for labels, count in sorted(counts.items()):
            family.add_metric(labels, count)
        return family

    def _progress(self) -> Iterator[GaugeMetricFamily]:
        families = {
            "step": GaugeMetricFamily("yuan2_finetune_step", "Optimizer steps done.", labels=RUN_LABELS),
            "total_steps": GaugeMetricFamily(
                "yuan2_finetune_total_steps", "Optimizer steps of the whole run.", labels=RUN_LABELS
            ),
            "loss": GaugeMetricFamily(
                "yuan2_finetune_loss", "Mean loss of the last step.", labels=RUN_LABELS
            ),
            "tokens_per_second": GaugeMetricFamily(
                "yuan2_finetune_tokens_per_second", "Tokens of all ranks a second.", labels=RUN_LABELS
            ),
        }
        for key, progress in sorted(self.words())[:RUNS_SHOWN]:
            for name, family in families.items():
                value = getattr(progress, name)
                if value is not None:
                    family.add_metric((key.namespace, key.name), value)
        yield from families.values()
