"""`loss.png`: losses and learning rate of a run, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from yuan2_trainer.reporting.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

SMOOTHED_SHARE = 1 / 40
"""Share of the steps that the smooth line averages over, and the fewest."""
_SMOOTHED_LEAST = 5
_FEW_STEPS = 20
_WIDE_BELOW = 500
MOST_POINTS = 4000
"""More points than a picture has columns only take time."""
_MEDIAN = 5
_SIZE = (9.0, 6.0)
_DPI = 120
_BLUE, _PALE, _RED, _GREEN, _GREY = "#1f5fa8", "#b9d0ea", "#c8441b", "#2c7a4b", "#5c6570"


@dataclass
class Curves:
    """Columns of a log."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """NaN where a loss was no number."""
    rates: list[float] = field(default_factory=list)
    evaluation_steps: list[int] = field(default_factory=list)
    evaluation_losses: list[float] = field(default_factory=list)
    epochs: float = 0.0


def read_curves(path: Path) -> Curves:
    """What a picture shows of `metrics.jsonl`."""
    curves = Curves()
    for row in read_metrics(path):
        if "loss" in row:
            curves.steps.append(row["step"])
            curves.losses.append(_number(row["loss"]))
            curves.rates.append(_number(row.get("learningRate")))
            curves.epochs = _number(row.get("epoch"))
        if row.get("evalLoss") is not None:
            curves.evaluation_steps.append(row["step"])
            curves.evaluation_losses.append(_number(row["evalLoss"]))
    return curves


def smoothed(values: Floats) -> Floats:
    """A running mean of a running mean, which gives near steps more weight and takes no leap at a spike; few
    steps are left as they are."""
    if len(values) < _FEW_STEPS:
        return values
    window = max(_SMOOTHED_LEAST, round(len(values) * SMOOTHED_SHARE))
    return running_mean(running_mean(values, window), window)


def running_mean(values: Floats, window: int) -> Floats:
    """Mean of the `window` values around each one, fewer at the ends; NaN is left out, and stays where there
    is nothing else."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    at = np.arange(len(values))
    first, last = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    number = counts[last] - counts[first]
    total: Floats = sums[last] - sums[first]
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)


def draw_losses(log: Path, picture: Path, name: str) -> None:
    """Draw a log into a picture, which is replaced whole; nothing is drawn before the first step."""
    curves = read_curves(log)
    if not curves.steps:
        return
    # matplotlib builds a list of the machine's fonts at its first use and says so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = make_figure(curves, name)
    beside = picture.with_name(f".{picture.name}")
    FigureCanvasAgg(figure).print_png(str(beside))
    beside.replace(picture)


def make_figure(curves: Curves, name: str) -> Figure:
    """Losses above, the learning rate below, over the same steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _losses(upper, curves)
    _rates(lower, curves)
    for axes in (upper, lower):
        axes.grid(visible=True, color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GREY, labelsize=9)
    lower.set_xlabel("optimizer step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    shown = [*curves.steps, *curves.evaluation_steps]
    margin = max(0.5, 0.01 * (max(shown) - min(shown)))
    lower.set_xlim(min(shown) - margin, max(shown) + margin)
    figure.suptitle(f"{name}: {_summary(curves)}", fontsize=12, x=0.02, ha="left")
    return figure


def _losses(axes: Axes, curves: Curves) -> None:
    steps, losses = np.asarray(curves.steps), np.asarray(curves.losses, dtype=np.float64)
    smooth = smoothed(losses)
    every = slice(None, None, max(1, len(steps) // MOST_POINTS))
    if len(steps) < _FEW_STEPS:
        axes.plot(steps, losses, color=_BLUE, marker="o", markersize=4, linewidth=2.0, label="training")
    else:
        axes.plot(
            steps[every],
            losses[every],
            color=_PALE,
            linewidth=1.4 if len(steps) < _WIDE_BELOW else 0.7,
            label="training, each step",
        )
        axes.plot(steps[every], smooth[every], color=_BLUE, linewidth=2.0, label="training, smoothed")
    if curves.evaluation_steps:
        axes.plot(
            curves.evaluation_steps,
            curves.evaluation_losses,
            color=_RED,
            marker="o",
            markersize=5,
            linewidth=1.5,
            label="evaluation",
        )
    axes.set_ylabel("loss per labelled token")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.set_ylim(*scale(losses, np.asarray(curves.evaluation_losses, dtype=np.float64)))


def without_spikes(values: Floats) -> Floats:
    """Running median of five: what single values that leap out do not change."""
    known = values[np.isfinite(values)]
    if len(known) < _MEDIAN:
        return known
    windows = np.lib.stride_tricks.sliding_window_view(known, _MEDIAN)
    return np.concatenate((known[:1], np.median(windows, axis=1)))


def scale(losses: Floats, evaluations: Floats) -> tuple[float, float]:
    """Ends of an axis on which single spikes are cut off: they would flatten everything else."""
    body = np.concatenate((without_spikes(losses), evaluations[np.isfinite(evaluations)]))
    if len(body) == 0:
        return 0.0, 1.0
    known = np.concatenate((losses, evaluations))
    low, high = (float(end) for end in (np.nanmin(body), np.nanmax(body)))
    reach = 0.3 * (high - low)
    low = max(low - reach, float(known[np.isfinite(known)].min()))
    high = min(high + reach, float(known[np.isfinite(known)].max()))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _rates(axes: Axes, curves: Curves) -> None:
    rates = np.asarray(curves.rates, dtype=np.float64)
    exponent = _exponent(rates)
    axes.plot(curves.steps, rates / 10.0**exponent, color=_GREEN, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate" if exponent == 0 else f"learning rate\n(× 10$^{{{exponent}}}$)")


def _exponent(rates: Floats) -> int:
    """Power of ten that leaves plain numbers at the axis."""
    highest = float(np.nanmax(rates)) if np.isfinite(rates).any() else 0.0
    return math.floor(math.log10(highest)) if highest > 0 else 0


def _summary(curves: Curves) -> str:
    said = f"{curves.steps[-1]} steps"
    if math.isfinite(curves.epochs) and curves.epochs > 0:
        said += f", {curves.epochs:.2f} epochs"
    smooth = smoothed(np.asarray(curves.losses, dtype=np.float64))
    if np.isfinite(smooth[-1]):
        said += f", loss {smooth[-1]:.3f}"
    if curves.evaluation_losses and math.isfinite(curves.evaluation_losses[-1]):
        said += f", evaluation {curves.evaluation_losses[-1]:.3f}"
    return said


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
