"""Model FLOPs utilisation of a step against the machine's own matrix products.

The rate that stands for 100% is measured beside every step: the products of the model's linear layers,
forward and both gradients, at the shapes of that step's micro batches and in its type. Gradient checkpointing
is off: what is computed again is no model FLOP.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tests.bench.report import Row, at_least, compared
from tests.bench.texts import Texts, in_fastchats_format, templated, write_records
from tests.bench.train_padding import SPEED
from tests.bench.trainer import Data, Epoch, Sizes, model_of, now, prepared, seconds, stepper_of
from yuan2_model.dimensions import EMBEDDING
from yuan2_model.flops import learned_only, model_flops

LENGTH = 2048
GOAL = 0.75


@dataclass(frozen=True)
class Case:
    """A model, and the samples of its steps."""

    sizes: Sizes
    batch: int


CASES = (Case(SPEED, 32), Case(Sizes(hidden=1024, layers=2), 16))
"""The model of the rows of samples a second, and one whose products are as large as processors like them."""


def measure(root: Path, given: Texts, pairs: int, cases: tuple[Case, ...] = CASES) -> list[Row]:
    """Every case in fp32, and in bf16 where the processor multiplies it."""
    root.mkdir()
    records = in_fastchats_format(templated(given.alpaca))
    data = prepared(write_records(root / "alpaca.json", records), given.model, root / "store", LENGTH)
    types = ("fp32", "bf16") if multiplies_bf16() else ("fp32",)
    return [_row(root, data, case, precision, pairs) for case in cases for precision in types]


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for products of bf16."""
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _row(root: Path, data: Data, case: Case, precision: str, pairs: int) -> Row:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = model_of(case.sizes, dtype)
    dimensions = model.config.dimensions()
    epoch = Epoch(stepper_of(model, data, root, LENGTH, precision), case.batch)
    done = epoch.step()
    _rate(model, done.computed_tokens, done.labelled_tokens, dtype)  # the first products are slower
    found = []
    for _ in range(pairs):
        began = now()
        done = epoch.step()
        took = now() - began
        flops = model_flops(dimensions, done.computed_tokens, done.attention_pairs, done.labelled_tokens)
        rate = _rate(model, done.computed_tokens, done.labelled_tokens, dtype)
        found.append((flops / took / 1e9, rate / 1e9))
    sizes = f"{case.sizes}, {case.batch} samples a step, length {LENGTH:,}"
    against = "the machine's matrix products, same shapes and type"
    return at_least(compared(f"model FLOPs of a step, {precision}", against, sizes, found, "GFLOP/s"), GOAL)


def _rate(model: nn.Module, tokens: int, labelled: int, dtype: torch.dtype) -> float:
    """FLOP/s of the products of a step, each shape three times: forward and the two gradients."""
    flops, took = 0.0, 0.0
    for inner, outer, count, rows in shapes(model, tokens, labelled):
        for sizes in ((rows, inner, outer), (rows, outer, inner), (outer, rows, inner)):
            left, right = torch.randn(sizes[:2]).to(dtype), torch.randn(sizes[1:]).to(dtype)
            out = torch.empty(sizes[0], sizes[2], dtype=dtype)
            took += count * seconds(lambda a=left, b=right, o=out: torch.mm(a, b, out=o))
            flops += 2 * count * sizes[0] * sizes[1] * sizes[2]
    return flops / took


def shapes(model: nn.Module, tokens: int, labelled: int) -> list[tuple[int, int, int, int]]:
    """(inner, outer, how often, rows) of the model's matrices; a convolution is one over two tokens."""
    counted: Counter[tuple[int, int, int]] = Counter()
    for name, parameter in model.state_dict().items():
        if parameter.dim() > 1 and name != EMBEDDING:
            learned = learned_only(name, model.config.num_hidden_layers)
            counted[parameter[0].numel(), parameter.shape[0], labelled if learned else tokens] += 1
    return [(inner, outer, count, rows) for (inner, outer, rows), count in counted.items()]
