"""Peak memory of the loss at Yuan 2.0's vocabulary: chunks of labelled positions against full logits.

Each side is a process of its own, which resets its high-water mark after the model is made and reads it after
one forward and backward pass over 4,096 tokens, all of them labelled: the worst case for ours.
`python -m tests.bench.train_memory chunks|full TOKENS VOCABULARY HIDDEN` is one side.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.bench.report import Row, at_most, compared
from yuan2_core.processors import available_cpus
from yuan2_model import Yuan2Config, random_model

TOKENS, VOCABULARY, LAYERS = 4096, 135040, 2
HIDDEN = (512, 2048)
"""The second is that of Yuan2-2B: the weight's own gradient is then a large part of what remains."""
SIDES = ("chunks", "full")
GOAL = 0.4


def measure(
    tokens: int = TOKENS, vocabulary: int = VOCABULARY, hidden: tuple[int, ...] = HIDDEN
) -> list[Row]:
    """Both sides at each hidden size."""
    return [_row(tokens, vocabulary, size) for size in hidden]


def _row(tokens: int, vocabulary: int, hidden: int) -> Row:
    ours, theirs = (_peak(side, tokens, vocabulary, hidden) / 1e9 for side in SIDES)
    sizes = f"{tokens:,} tokens, all labelled, vocabulary {vocabulary:,}, hidden {hidden:,} × {LAYERS} layers"
    return at_most(
        compared("peak memory of a pass", "`CrossEntropyLoss` on full logits", sizes, [(ours, theirs)], "GB"),
        GOAL,
    )


def _peak(side: str, *sizes: int) -> int:
    command = [sys.executable, "-m", "tests.bench.train_memory", side, *map(str, sizes)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(side: str, tokens: int, vocabulary: int, hidden: int) -> None:
    """Print the bytes that one step takes beyond the loaded model."""
    torch.set_num_threads(available_cpus())
    config = Yuan2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        eod_token=1,
        sep_token=2,
        use_cache=False,
    )
    model = random_model(config, seed=0).train()
    ids = torch.randint(0, vocabulary // 2, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
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
    main(sys.argv[1], *map(int, sys.argv[2:]))
