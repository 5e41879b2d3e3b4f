"""Peak memory of the loss at Yuan 2.0's vocabulary: chunks of labelled positions against full logits.

Each side is a process of its own, which resets its high-water mark after the model is made and reads it after
one forward and backward pass over 4,096 tokens, all of them labelled: the worst case for ours.
`python -m tests.bench.train_memory chunks|full` is one side.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.bench.report import Row, at_most, plain
from yuan2_core.processors import available_cpus
from yuan2_model import Yuan2Config, random_model

TOKENS, VOCABULARY, HIDDEN, LAYERS = 4096, 135040, 512, 2
SIDES = ("full", "chunks")


def measure() -> list[Row]:
    """Both sides, and their ratio."""
    full, chunks = (_peak(side) for side in SIDES)
    return [
        plain(f"peak memory of {TOKENS:,} tokens, CrossEntropyLoss on full logits", full / 1e9, "GB"),
        plain(f"peak memory of {TOKENS:,} tokens, loss in chunks", chunks / 1e9, "GB"),
        at_most("peak memory, times that of full logits", chunks / full, "x", 0.4),
    ]


def _peak(side: str) -> int:
    command = [sys.executable, "-m", "tests.bench.train_memory", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(side: str) -> None:
    """Print the bytes that one step takes beyond the loaded model."""
    torch.set_num_threads(available_cpus())
    config = Yuan2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        use_cache=False,
    )
    model = random_model(config, seed=0).train()
    ids = torch.randint(0, 70000, (2, TOKENS // 2), generator=torch.Generator().manual_seed(0))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew (proc(5))
    if side == "full":
        logits = model(input_ids=ids).logits
        loss = torch.nn.CrossEntropyLoss()(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    else:
        loss = model(input_ids=ids, labels=ids, return_logits=False).loss
    loss.backward()
    print(_memory("VmHWM") - before)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(sys.argv[1])
