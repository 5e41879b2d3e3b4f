"""What another processor may make of the same computation in bf16.

Processors sum products in another order, fuse other operations and round elsewhere, but a correct one rounds
an operation's result to one of the two neighbours of the true value. `OtherRounding` (Monte Carlo arithmetic:
Parker, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic", 1997) moves each bf16
result of each operation to the number below, leaves it, or moves it to the number above, by chance. That is
more than two correct processors differ by, since their results mostly agree: what is farther away than
computations under it are from each other is no rounding. The bound follows from the format and the
operations, and is the same on every machine up to second order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NO_ROUNDING = {
    *("clone", "copy_", "detach", "embedding", "index_select", "cat", "stack", "index_copy_", "gather"),
    *("empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros", "ones_like", "full", "fill_"),
    *("index_fill_", "lift_fresh", "zero_", "masked_fill", "neg"),
}
"""Operations that move or set numbers and compute none."""


class OtherRounding(TorchDispatchMode):
    """Inside, every bf16 result of an operation is moved by at most one unit in the last place, by chance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, then round otherwise."""
        out = func(*args, **(kwargs or {}))
        if self._rounds(func, args):
            for result in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(result, Tensor) and result.dtype == torch.bfloat16:
                    self._nudge(result)
        return out

    def _rounds(self, func: Any, args: Any) -> bool:
        name = func._schema.name.partition("::")[2]
        if name == "_to_copy":
            return args[0].dtype != torch.bfloat16
        # A view has its source's numbers; an operation in place has an alias too, and writes to it.
        views = any(item.alias_info and not item.alias_info.is_write for item in func._schema.returns)
        return not views and name not in _NO_ROUNDING

    def _nudge(self, result: Tensor) -> None:
        """Neighbouring numbers of a sign have neighbouring bits."""
        step = torch.randint(-1, 2, result.shape, generator=self.generator, dtype=torch.int16)
        step[result == 0] = 0  # a sum of nothing, which every processor makes
        moved = result.contiguous().view(torch.int16) + step
        result.copy_(moved.view(torch.bfloat16))


def rounding_distance(measure: Callable[[], Tensor], samples: int = 4) -> float:
    """Twice the root mean square distance of a vector computed with other roundings from the plain one.

    A distance in many dimensions, summed from many small independent moves, hardly varies; two is for the
    second computation, which rounds otherwise as well.
    """
    plain = measure()
    squares = []
    for seed in range(samples):
        with OtherRounding(seed):
            other = measure()
        squares.append((other - plain).square().sum())
    return 2 * float(torch.stack(squares).mean().sqrt())
