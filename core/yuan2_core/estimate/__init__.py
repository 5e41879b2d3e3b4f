"""What a fine-tuning will need: memory of a GPU and hours, from first principles and a few named constants.

`estimate(run)` is pure and needs neither torch nor a GPU. `docs/estimate.md` shows it beside what others
measured.
"""

from yuan2_core.estimate.advice import fits
from yuan2_core.estimate.gpus import GPUS, Gpu, find_gpu
from yuan2_core.estimate.memory import Memory
from yuan2_core.estimate.result import Estimate, estimate, estimate_for_spec, run_for_spec
from yuan2_core.estimate.run import OURS, PUBLISHED, Data, Run, Shape, Software

__all__ = [
    "estimate",
    "estimate_for_spec",
    "run_for_spec",
    "fits",
    "Estimate",
    "Memory",
    "Run",
    "Shape",
    "Data",
    "Software",
    "OURS",
    "PUBLISHED",
    "Gpu",
    "GPUS",
    "find_gpu",
]
