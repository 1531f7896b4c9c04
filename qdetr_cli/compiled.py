"""Rounding to a grid and its gradients as kernels that torch.compile fuses: one pass over memory each way.

The same numbers as `fake_quant` computes block by block: values to the last bit, sums up to the order of
addition. Compiling takes some seconds for each kind of tensor, so it pays in a training and not in a test.
Where there is no compiler that is said, and everything goes on without.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qdetr_cli.ranges import STEP_FLOOR

_RECOMPILATIONS = 64  # kinds of tensors (ranks, sides of one, dtypes) that may meet one kernel
_state = {"on": False}


@contextmanager
def compiled_kernels(wanted: bool, device: str = "cpu") -> Iterator[bool]:
    """For the duration of the block, fake quantization runs in compiled kernels, if `wanted` and possible.

    Gives whether it does; where `device` cannot, a warning says why.
    """
    before = _state["on"]
    _state["on"] = wanted and _works(device)
    try:
        yield _state["on"]
    finally:
        _state["on"] = before


def takes(x: Tensor) -> bool:
    """Whether x is to be rounded by a compiled kernel."""
    return _state["on"] and x.dtype != torch.float64 and x.numel() > 0


@cache
def _works(device: str) -> bool:
    try:
        x, one = torch.zeros(4, device=device), torch.ones(1, device=device)
        round_to_grid(x, one, one, -8, 7)
        gradients(x, x, one, one, -8, 7)
    except Exception as error:  # no compiler, one that fails, a platform without inductor
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"torch.compile does not work here ({reason[0] if reason else type(error).__name__}); "
            "fake quantization runs uncompiled, which is slower",
            stacklevel=2,
        )
        return False
    return True


def round_to_grid(x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Return x rounded to the grid, in its dtype; step and offset broadcast against x."""
    y: Tensor = _kernels()[0](x, step, offset, qmin, qmax)
    return y


def gradients(
    g: Tensor, x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return g where x is on the grid (as x), and the sums of g dy/dstep and g dy/doffset, (channels,) each.

    x is (n,) with one step, or (outer, channels, inner) with step and offset (channels, 1). Sums that would
    drive a step or offset beyond its bounds further out are 0.
    """
    found: tuple[Tensor, Tensor, Tensor] = _kernels()[1](g, x, step, offset, qmin, qmax)
    return found


@cache
def _kernels() -> tuple[Any, Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
    return torch.compile(_round, dynamic=True), torch.compile(_gradients, dynamic=True)


def _grid(step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> tuple[Tensor, Tensor | float]:
    return step.clamp_min(STEP_FLOOR), 0.0 if offset is None else offset.round().clamp(qmin, qmax)


def _round(x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    live, zero = _grid(step, offset, qmin, qmax)
    moved = (x.float() / live).round() + zero
    return ((moved.clamp(qmin, qmax) - zero) * live).to(x.dtype)


def _gradients(
    g: Tensor, x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    live, zero = _grid(step, offset, qmin, qmax)
    g, scaled = g.float(), x.float() / live
    moved = scaled + zero
    inside = torch.where((moved >= qmin) & (moved <= qmax), g, 0.0)
    number = (scaled.round() + zero).clamp(qmin, qmax) - zero
    axes = [0] if x.dim() == 1 else [0, 2]
    by_step = (g * number - inside * scaled).sum(axes)
    by_step = torch.where((step.flatten() < STEP_FLOOR) & (by_step > 0), 0.0, by_step)
    if offset is None:
        return inside.to(x.dtype), by_step, by_step
    by_offset = ((inside - g) * live).sum(axes)
    own = offset.flatten()
    stuck = ((own < qmin) & (by_offset > 0)) | ((own > qmax) & (by_offset < 0))
    return inside.to(x.dtype), by_step, torch.where(stuck, 0.0, by_offset)
