"""Where the grid of a quantizer begins and ends: a step and an offset from sampled values.

A "range" plugin is called as `plugin(values, format, **options)` and returns (low, high), each (channels,):
the real values that the grid should span. `values` is (channels, n): a fair sample of what was seen, whose
last two columns are the exact minimum and maximum of each channel (over everything, sampled or not).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qdetr_cli import plugins
from qdetr_cli.errors import RecipeError
from qdetr_cli.recipe import QuantFormat

Range = Callable[..., tuple[Tensor, Tensor]]

STEP_FLOOR = (
    2.0**-27
)  # 7.5e-9; a float32, and below the smallest positive float16, so it limits no real tensor
_COARSE = (1.0, 0.86, 0.74, 0.63, 0.52, 0.42, 0.34, 0.27, 0.21, 0.16, 0.12, 0.09, 0.06, 0.04, 0.02, 0.01, 0.0)
_FINE = (1.12, 1.06, 1.03, 1.015, 1.007)  # factors of the refinement, one round each
_BLOCK = 1 << 16  # values that one pass holds; small enough for the cache of one core


MID_RISE_ZERO = -0.5  # the zero point of a mid-rise grid, whose levels are (q + 1/2) * step


def has_free_offset(format: QuantFormat) -> bool:
    """Return whether the offset may be any real number (option `free_offset`): 0 may lie off the grid."""
    return not format.symmetric and bool(format.quantizer_options.get("free_offset", False))


def is_shifted(format: QuantFormat) -> bool:
    """Return whether the zero point is added before rounding, because it need not be whole."""
    return format.mid_rise or has_free_offset(format)


@plugins.register("range", "minmax")
def minmax(values: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return the exact minimum and maximum per channel, (channels,) each."""
    return values.amin(1), values.amax(1)


@plugins.register("range", "percentile")
def percentile(values: Tensor, format: QuantFormat, *, percent: float = 99.99) -> tuple[Tensor, Tensor]:
    """Return the (100 - percent) and percent percentiles per channel, (channels,) each.

    `percent` lies in (50, 100]; RecipeError otherwise.
    """
    if not 50 < percent <= 100:
        raise RecipeError(f"init percentile: percent: {percent} is not in (50, 100]; 99.99 is the default")
    ordered = _sample(values).sort(1).values  # (channels, n)
    part = (ordered.shape[1] - 1) * (1 - percent / 100)
    return _at(ordered, part), _at(ordered, ordered.shape[1] - 1 - part)


@plugins.register("range", "mse")
def mse(values: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return the ends of the grid with the least squared error per channel, (channels,) each.

    Both ends are searched jointly (one, where there is no offset): a coarse grid of parts of the extremes,
    rounds of refinement around the best, then the closed-form step for the integers that this grid assigns.
    """
    if has_free_offset(format):  # the grid may lie anywhere: search around the mean instead of around 0
        center = _sample(values).mean(1)
        low, high = _search(values - center[:, None], format)
        return low + center, high + center
    return _search(values, format)


def _search(values: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return the best ends that a search from the extremes towards 0 finds, (channels,) each."""
    low, high = values.amin(1), values.amax(1)
    sample = _sample(values)
    coarse = sample[:, :: 1 + sample.shape[1] // 4096]
    if format.symmetric:
        low, high = _symmetric_ends(low, high, format)
    low, high = _best(coarse, *_candidates(low, high, torch.tensor(_COARSE), format), format)
    for factor in _FINE:
        low, high = _best(
            sample, *_candidates(low, high, torch.tensor((1 / factor, 1.0, factor)), format), format
        )
    return _polish(sample, low, high, format)


def grid_from_range(low: Tensor, high: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return (step, zero point), shaped as `low`, of the grid that spans [low, high].

    Symmetric: the zero point is 0, or MID_RISE_ZERO. Asymmetric: it is a whole number in
    qmin..qmax and 0 lies on the grid, unless the format has a free offset: then it is any real number. The
    step is at least STEP_FLOOR.
    """
    if format.symmetric:
        least, most = _symmetric_levels(format)
        below = low / least if least else torch.zeros_like(low)
        step = torch.maximum(high / most, below).clamp_min(STEP_FLOOR)
        return step, torch.full_like(step, format.qmin - least)
    free = has_free_offset(format)
    if not free:
        low, high = low.clamp_max(0), high.clamp_min(0)
    step = ((high - low) / (format.qmax - format.qmin)).clamp_min(STEP_FLOOR)
    zero_point = format.qmin - low / step
    return step, zero_point if free else zero_point.round().clamp(format.qmin, format.qmax)


def _sample(values: Tensor) -> Tensor:
    """Return the values without the two columns of extremes, unless there is nothing else."""
    return values[:, :-2] if values.shape[1] > 2 else values


def _at(ordered: Tensor, place: float) -> Tensor:
    """Return the value at a real-valued place of each sorted row, (channels,), by linear interpolation."""
    below = min(int(place), ordered.shape[1] - 1)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


def _symmetric_levels(format: QuantFormat) -> tuple[float, float]:
    """Return the lowest and the highest level of a grid without an offset, in steps."""
    zero = MID_RISE_ZERO if format.mid_rise else 0.0
    return format.qmin - zero, format.qmax - zero


def _symmetric_ends(low: Tensor, high: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return the ends of the widest grid worth trying: its highest integer is the largest magnitude."""
    least, most = _symmetric_levels(format)
    step = torch.maximum(high, -low if format.qmin else high) / most
    return step * least, step * most


def _candidates(low: Tensor, high: Tensor, factors: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return (lows, highs), (channels, k) each: the ends times every factor, or every pair of factors."""
    factors = factors.to(low)
    if format.symmetric:
        return low[:, None] * factors, high[:, None] * factors
    pairs = torch.cartesian_prod(factors, factors)  # (k, 2)
    return low[:, None] * pairs[:, 0], high[:, None] * pairs[:, 1]


def _best(values: Tensor, lows: Tensor, highs: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return the candidate (low, high) with the least squared error per channel, (channels,) each."""
    steps, zeros = grid_from_range(lows, highs, format)
    choice = _errors(values, steps, zeros, format).argmin(1, keepdim=True)
    return lows.gather(1, choice)[:, 0], highs.gather(1, choice)[:, 0]


def _errors(values: Tensor, steps: Tensor, zeros: Tensor, format: QuantFormat) -> Tensor:
    """Return the squared error of each grid, (channels, k), of values (channels, n)."""
    errors = torch.empty_like(steps)
    rows = max(1, _BLOCK // values.shape[1])
    for begin in range(0, values.shape[0], rows):
        block = values[begin : begin + rows]
        work, rounded = torch.empty_like(block), torch.empty_like(block)
        for k in range(steps.shape[1]):
            step, zero = (grid[begin : begin + rows, k, None] for grid in (steps, zeros))
            torch.div(block, step, out=work).add_(zero)
            torch.round(work, out=rounded).clamp_(format.qmin, format.qmax).sub_(work)
            errors[begin : begin + rows, k] = (
                torch.linalg.vector_norm(rounded, dim=1).mul_(step[:, 0]).square_()
            )
    return errors


def _polish(values: Tensor, low: Tensor, high: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Return the ends after two rounds of least squares on the step, kept where the error falls."""
    if has_free_offset(format):
        return low, high
    step, zero = grid_from_range(low, high, format)
    below, above, middle = ((end - zero)[:, None] for end in (format.qmin, format.qmax, 0))
    for _ in range(2):
        rounded = (values / step[:, None]).sub_(middle).round_().add_(middle)
        counts = torch.minimum(torch.maximum(rounded, below), above)
        better = (values * counts).sum(1) / counts.square().sum(1).clamp_min(1)
        pair = torch.stack((step, torch.where(better > STEP_FLOOR, better, step)), 1)
        choice = _errors(values, pair, zero[:, None].expand_as(pair), format).argmin(1, keepdim=True)
        step = pair.gather(1, choice)[:, 0]
    return step * below[:, 0], step * above[:, 0]
