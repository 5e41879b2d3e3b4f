"""Losses of preference training, from the log-probabilities of whole answers. Pure.

Each returns the loss of each comparison and the rewards of its answers, beta times how much more likely the
model makes an answer than its reference does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from yuan2_core.sections import DPO, KTO, ORPO


class Compared(NamedTuple):
    """Of P comparisons: their losses, and the rewards of their answers, all [P]."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


def dpo(policy_P2: Tensor, reference_P2: Tensor, settings: DPO) -> Compared:
    """Equation 7 of arXiv 2305.18290; with label smoothing, equation 3 of Mitchell's note on it.

    Args:
        policy_P2: log-probabilities of the chosen and the rejected answer.
        reference_P2: the same of the reference.
        settings: beta and the smoothing.
    """
    rewards_P2 = settings.beta * (policy_P2 - reference_P2)
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    smoothing = settings.label_smoothing
    losses_P = -(1 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P)
    return Compared(losses_P, rewards_P2[:, 0], rewards_P2[:, 1])


def orpo(mean_P2: Tensor, settings: ORPO) -> Compared:
    """Equations 3 to 7 of arXiv 2403.07691.

    Args:
        mean_P2: log-probability of a token of the chosen and of the rejected answer, on average.
        settings: beta, the paper's lambda.
    """
    log_odds_P2 = mean_P2 - torch.log(-torch.expm1(mean_P2))
    ratio_P = logsigmoid(log_odds_P2[:, 0] - log_odds_P2[:, 1])
    rewards_P2 = settings.beta * mean_P2
    return Compared(-mean_P2[:, 0] - settings.beta * ratio_P, rewards_P2[:, 0], rewards_P2[:, 1])


def kto(
    policy_P: Tensor, reference_P: Tensor, desirable_P: Tensor, kl: float, settings: KTO
) -> tuple[Tensor, Tensor]:
    """Equation 8 of arXiv 2402.01306, with the constant lambda_y left out, as TRL does.

    Args:
        policy_P: log-probability of each answer.
        reference_P: the same of the reference.
        desirable_P: which answers are desirable.
        kl: how far the model has moved, in nats, at least 0; nothing is learned from it.
        settings: beta and the weights.

    Returns:
        Losses and rewards, [P].
    """
    rewards_P = settings.beta * (policy_P - reference_P)
    gain_P = torch.where(desirable_P, rewards_P - settings.beta * kl, settings.beta * kl - rewards_P)
    weight_P = torch.where(desirable_P, settings.desirable_weight, settings.undesirable_weight)
    return weight_P * (1 - torch.sigmoid(gain_P)), rewards_P
