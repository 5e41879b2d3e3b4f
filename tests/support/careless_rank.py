"""A rank whose DeepSpeed gives parameters another type than was asked for; a variable says where."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch

from tests.support.processors import CARELESS
from yuan2_trainer import rank


def main(arguments: list[str]) -> int:
    """Run a rank."""
    if os.environ[CARELESS] == "zero.Init":
        deepspeed.zero.Init._set_dtype = _set_bf16
    else:
        deepspeed.initialize = _with_a_bf16_norm(deepspeed.initialize)
    return rank.main(arguments)


def _set_bf16(init: Any, *_: object) -> None:
    init.dtype = torch.bfloat16


def _with_a_bf16_norm(initialize: Any) -> Any:
    def careless(**arguments: Any) -> Any:
        made = initialize(**arguments)
        made[0].module.model.norm.to(torch.bfloat16)
        return made

    return careless
