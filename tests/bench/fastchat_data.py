"""FastChat's own data path, in a process of its own and in whatever environment FastChat is installed in.

Imports nothing of this project. Started with one JSON object (`tokenizer`, `data`, `length`,
`special_tokens`); after a line `ready` it answers each line of standard input, a task, with one line, the
seconds that it took:

- `{"task": "samples", "indices": [...]}`: tokenised and masked, one after the other, as the lazy data set
  that the recipe recommends does it.
- `{"task": "batches", "indices": [...], "size": 4, "file": "x.pt"}`: the same behind the DataLoader that
  transformers' Trainer makes of them (no workers: its default, which the recipe leaves); written to the file.
- `{"task": "forget"}`: empties the cache of the lazy data set, which lives as long as the process.

What FastChat prints for every sample is silenced: it would take most of the time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fastchat.train import train_yuan2
from torch.utils.data import DataLoader, Subset
from transformers import DataCollatorWithPadding, LlamaTokenizer


def main() -> None:
    """Answer tasks until standard input ends."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = slow_tokenizer(settings["tokenizer"], settings["length"], settings["special_tokens"])
    vars(train_yuan2).update(print=silent, rank0_print=silent)
    arguments = SimpleNamespace(
        data_path=settings["data"],
        eval_data_path=None,
        lazy_preprocess=True,
        last_response_loss=False,
        split_example_loss=True,
        efficient_loss=False,
    )
    data = train_yuan2.make_supervised_data_module(tokenizer, arguments)["train_dataset"]
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(json.loads(line), data, tokenizer), flush=True)


def slow_tokenizer(model: str, length: int, special_tokens: list[str]) -> Any:
    """The tokenizer as FastChat's `train` sets it up."""
    tokenizer = LlamaTokenizer(model, add_bos_token=False, add_eos_token=False, legacy=True)
    tokenizer.model_max_length = length
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_tokens(special_tokens, special_tokens=True)
    return tokenizer


def answer(task: dict[str, Any], data: Any, tokenizer: Any) -> float:
    """Do a task; gives its seconds."""
    if task["task"] == "forget":
        return seconds(data.cached_data_dict.clear)
    if task["task"] == "samples":
        return seconds(lambda: [data[index] for index in task["indices"]])
    batches: list[dict[str, torch.Tensor]] = []
    loader = DataLoader(Subset(data, task["indices"]), task["size"], collate_fn=collator(tokenizer))
    took = seconds(lambda: batches.extend(dict(batch) for batch in loader))
    torch.save(batches, task["file"])
    return took


def collator(tokenizer: Any) -> Any:
    """The one that Trainer takes where it is given a tokenizer."""
    return DataCollatorWithPadding(tokenizer)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def silent(*_: object) -> None:
    """A print that prints nothing."""


if __name__ == "__main__":
    main()
