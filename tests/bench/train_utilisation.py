"""Model FLOPs utilisation of a step against the machine's own matrix products, and what the loss saves.

The rate that stands for 100% is measured beside every step: the products of the model's linear layers,
forward and both gradients, at the shapes of that step's micro batches and in its type.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from tests.bench.prepare import inputs
from tests.bench.report import Row, at_least, plain
from tests.bench.trainer import Epoch, model_of, now, prepared, seconds, stepper_of, write_records
from yuan2_model.dimensions import EMBEDDING
from yuan2_model.flops import learned_only, model_flops

HIDDEN, LAYERS, LENGTH = 1024, 2, 2048
BATCH = 16
"""Samples of a step: some 3,000 tokens, one micro batch of two rows."""
GOAL = 0.75


def measure(root: Path, pairs: int) -> list[Row]:
    """fp32, and bf16 where the processor multiplies it."""
    rows = [
        at_least("model FLOPs utilisation of a step, fp32", *_utilisation(root / "fp32", "fp32", pairs), GOAL)
    ]
    if multiplies_bf16():
        value, unit = _utilisation(root / "bf16", "bf16", pairs)
        rows.append(plain("model FLOPs utilisation of a step, bf16", value, unit))
    return rows


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for products of bf16."""
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _utilisation(root: Path, precision: str, pairs: int) -> tuple[float, str]:
    root.mkdir()
    model_directory, records, _ = inputs(root)
    data = prepared(write_records(root / "alpaca.json", records), model_directory, root / "store", LENGTH)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = model_of(HIDDEN, LAYERS, dtype)
    dimensions = model.config.dimensions()
    epoch = Epoch(stepper_of(model, data, root, LENGTH, precision), BATCH)
    done = epoch.step()
    _rate(model, done.computed_tokens, done.labelled_tokens, dtype)  # the first products are slower
    found = []
    for _ in range(pairs):
        began = now()
        done = epoch.step()
        took = now() - began
        flops = model_flops(dimensions, done.computed_tokens, done.attention_pairs, done.labelled_tokens)
        rate = _rate(model, done.computed_tokens, done.labelled_tokens, dtype)
        found.append(flops / took / rate)
    return sorted(found)[len(found) // 2], ""


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
