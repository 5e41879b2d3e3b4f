"""Preference data for tests, and the losses of the papers over whole logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid, sigmoid

from tests.support.training import WORDS


def pairs(count: int) -> list[dict[str, Any]]:
    """LLaMA-Factory's pairs: the preferred answer names the word, the other one a later one."""
    return [_pair(number) for number in range(count)]


def _pair(number: int) -> dict[str, Any]:
    word, other = WORDS[number % len(WORDS)], WORDS[(number + 3) % len(WORDS)]
    before = [
        {"from": "human", "value": f"{other} {number}?"},
        {"from": "gpt", "value": f"{other} is {number % 7}"},
    ]
    question = {"from": "human", "value": f"{word} {number}?" + " why" * (number % 5) + " and what of it" * 3}
    return {
        "conversations": [*(before if number % 2 else []), question],
        "chosen": {"from": "gpt", "value": f"{word} is {number * 7 % 13}" + f", {word}" * (number % 4)},
        "rejected": {"from": "gpt", "value": f"{other} was {number % 5}" + f" {other}" * (number % 3)},
    }


def write_pairs(path: Path, count: int) -> Path:
    path.write_text(json.dumps(pairs(count)), encoding="utf-8")
    return path


def dpo_of_the_paper(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float
) -> torch.Tensor:
    """Mean over pairs; [P, 2] log-probabilities of the chosen and the rejected answer."""
    logits = beta * ((policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1]))
    return (-(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)).mean()


def orpo_of_the_paper(mean: torch.Tensor, weight: float) -> torch.Tensor:
    """Mean over pairs; [P, 2] mean log-probabilities of a token."""
    likelihood = mean.exp()
    odds = likelihood / (1 - likelihood)
    return (-mean[:, 0] - weight * torch.log(sigmoid(torch.log(odds[:, 0] / odds[:, 1])))).mean()


def kto_of_the_paper(
    policy: torch.Tensor, reference: torch.Tensor, desirable: torch.Tensor, kl: float, settings: Any
) -> torch.Tensor:
    """Mean over examples."""
    ratio = policy - reference
    value_of_good = sigmoid(settings.beta * (ratio - kl))
    value_of_bad = sigmoid(settings.beta * (kl - ratio))
    losses = torch.where(
        desirable,
        settings.desirable_weight * (1 - value_of_good),
        settings.undesirable_weight * (1 - value_of_bad),
    )
    return losses.mean()
