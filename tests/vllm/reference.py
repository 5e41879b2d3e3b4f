"""Our own model as a program, run with `.venv`: it makes tiny models and says what they answer.

vLLM pins torch and transformers of its own: so the two sides are processes of their own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.serving import tiny_model
from yuan2_model import Yuan2ForCausalLM, load_model
from yuan2_model.adapters import with_adapter


def make(directory: str, context: int = 512) -> None:
    """Write a random model and a tokenizer in the published layout: heads of 32, three layers, a megabyte."""
    tiny_model(Path(directory), context=context, hidden=128, layers=3, heads=4, spread=0.15)


@torch.no_grad()
def answers(
    model: Yuan2ForCausalLM, prompts: list[list[int]], length: int, tokens: int
) -> list[dict[str, Any]]:
    """Each prompt's greedy continuation of `length` ids, whatever ends a text, and their log-probabilities.

    Only the first `tokens` ids count: the others have no text.
    """
    found = []
    for prompt in prompts:
        ids, scores, cache = [], [], None
        step = torch.tensor([prompt])
        for _ in range(length):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            best, score = _best(output.logits[0, -1, :tokens])
            ids.append(best)
            scores.append(score)
            step = torch.tensor([[best]])
        found.append({"ids": ids, "logprobs": scores})
    return found


def _best(logits: Tensor) -> tuple[int, float]:
    scores = logits.float().log_softmax(-1)
    return int(scores.argmax()), float(scores.max())


def adapter(directory: str, model: str, rank: int, seed: int) -> None:
    """Write a random LoRA adapter on all seven projections in PEFT's layout, strong enough to change
    answers."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    adapted = get_peft_model(load_model(model, dtype="float32"), config)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3 / rank)
    adapted.save_pretrained(directory)


def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What a model, with an adapter merged into it where one is named, says to prompts."""
    model = load_model(request["model"], dtype=request.get("dtype", "float32"))
    if "adapter" in request:
        model = with_adapter(model, request["adapter"])
    return answers(model, request["prompts"], request["length"], request["tokens"])


@torch.no_grad()
def score(model: str, texts: list[list[int]], tokens: int, dtype: str) -> list[list[float]]:
    """Log-probability of each token of each text but the first, given those before it.

    Only the first `tokens` ids count: the others have no text.
    """
    loaded = load_model(model, dtype=dtype)
    found = []
    for text in texts:
        logits = loaded(input_ids=torch.tensor([text]), use_cache=False).logits[0, :-1, :tokens]
        rows = logits.float().log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist())
    return found


def main() -> None:
    """One JSON request from standard input, one JSON answer to standard output."""
    torch.set_num_threads(1)
    does: dict[str, Any] = {
        "make": make,
        "adapter": adapter,
        "score": score,
        "answer": lambda **request: answer(request),
    }
    requests = json.load(sys.stdin)
    sys.stdout.write(json.dumps([does[name](**request) for name, request in requests]))


if __name__ == "__main__":
    main()
