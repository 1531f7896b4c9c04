"""The arithmetic of a grid, and rounding to it as one autograd function that makes few passes over memory.

    y = n * step,  n = clip(round(x / step), qmin - zero, qmax - zero)

With the straight-through estimator for both roundings (x / step, and zero = round(offset)):

    where x / step is between the ends:  dy/dx = 1   dy/dstep = n - x / step   dy/doffset = 0
    beyond them:                         dy/dx = 0   dy/dstep = n              dy/doffset = -step

(LSQ eq. 3; LSQ+ eq. 6 with beta = -step * offset.) Summed over the incoming gradient g, with g_in = g between
the ends and 0 beyond,

    sum g dy/dstep = (sum g y - sum g_in x) / step      sum g dy/doffset = -step * (sum g - sum g_in)

so the backward pass needs x and g alone: y is computed again from x, here and for the layer that follows
(see `recomputed`). On a CPU both passes work through blocks that stay in its cache: memory is read once and
written once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, inf, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdetr_cli import compiled
from qdetr_cli.ranges import MID_RISE_ZERO, STEP_FLOOR, is_shifted
from qdetr_cli.recipe import QuantFormat
from qdetr_cli.recomputed import remember

_BLOCK = 1 << 16  # values per thread in one block
_TINY = 1.2e-38  # about the smallest normal float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The numbers (q - zero) * step for whole q in qmin..qmax. step, zero: (channels,) float32; None: 0."""

    step: Tensor
    zero: Tensor | None  # whole numbers, unless the grid is shifted
    qmin: int
    qmax: int
    shifted: bool  # by a zero that is added before rounding, since it need not be whole

    def integers(self, x: Tensor, axis: int | None) -> Tensor:
        """Return the grid numbers q of x, in a real dtype."""
        step, zero = self._along(x, axis)
        scaled = _real(x) / step
        if zero is None:
            return scaled.round().clamp(self.qmin, self.qmax)
        moved = (scaled + zero).round() if self.shifted else scaled.round() + zero
        return moved.clamp(self.qmin, self.qmax)

    def dequantize(self, q: Tensor, axis: int | None) -> Tensor:
        """Return the real values of grid numbers q, float32 unless q is float64."""
        step, zero = self._along(q, axis)
        return _real(q) * step if zero is None else (_real(q) - zero) * step

    def round(self, x: Tensor, axis: int | None) -> Tensor:
        """Return x rounded to the grid, in its dtype."""
        return self.dequantize(self.integers(x, axis), axis).to(x.dtype)

    def whole(self) -> "Grid":
        """Return a mid-rise grid as one of whole numbers at half the step: (2 q + 1) * step / 2."""
        low, high = 2 * self.qmin + 1, 2 * self.qmax + 1
        return Grid(step=self.step / 2, zero=None, qmin=low, qmax=high, shifted=False)

    def _along(self, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor | None]:
        """Return step and zero shaped to broadcast against x."""
        shape = [1] * x.dim()
        if axis is not None:
            shape[axis] = -1
        return self.step.reshape(shape), None if self.zero is None else self.zero.reshape(shape)


def make_grid(step: Tensor, offset: Tensor | None, format: QuantFormat) -> Grid:
    """Return the grid of a step and offset, (channels,): the step floored, the offset rounded unless free."""
    step = step.detach().float().clamp_min(STEP_FLOOR)
    shifted = is_shifted(format)
    zero = None if offset is None else offset.detach().float()
    if format.mid_rise:
        zero = torch.full_like(step, MID_RISE_ZERO)
    elif zero is not None and not shifted:
        zero = zero.round().clamp(format.qmin, format.qmax)
    return Grid(step=step, zero=zero, qmin=format.qmin, qmax=format.qmax, shifted=shifted)


def fake_quantize(
    x: Tensor, step: Tensor, offset: Tensor | None, format: QuantFormat, *, axis: int | None, scale: float
) -> Tensor:
    """Return x rounded to the grid, same shape and dtype, with the gradients of the module docstring.

    The gradients of step and offset are multiplied by `scale`. Below its floor the step can only grow, and
    beyond the grid the zero point can only come back.
    """
    function = _Compiled if compiled.takes(x) and not is_shifted(format) else _FakeQuantize
    x = x.contiguous(memory_format=_layout(x, axis))
    y: Tensor = function.apply(x, step, offset, format, axis, scale)
    if y.requires_grad and y.numel():
        own, grid = x.detach(), (step.detach().clone(), None if offset is None else offset.detach().clone())
        remember(y, lambda: function.rounded(own, *grid, format, axis))
    return y


class _Compiled(torch.autograd.Function):
    """The same in two kernels."""

    @staticmethod
    def rounded(
        x: Tensor, step: Tensor, offset: Tensor | None, format: QuantFormat, axis: int | None
    ) -> Tensor:
        layout = _layout(x, axis)
        flat, live, zero = _flattened(x, step, offset, axis, layout)
        return _like(compiled.round_to_grid(flat, live, zero, format.qmin, format.qmax), x, layout)

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, *rest: Any) -> Tensor:
        ctx.format, ctx.axis, ctx.scale = rest
        ctx.save_for_backward(x, step, offset)
        return _Compiled.rounded(x, step, offset, ctx.format, ctx.axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, step, offset = ctx.saved_tensors
        layout = _layout(x, ctx.axis)
        flat, live, zero = _flattened(x, step, offset, ctx.axis, layout)
        incoming = _flattened(g, step, offset, ctx.axis, layout)[0]
        ends = (ctx.format.qmin, ctx.format.qmax)
        g_in, d_step, d_offset = compiled.gradients(incoming, flat, live, zero, *ends)
        by_offset = None if offset is None else d_offset.mul_(ctx.scale)
        return _like(g_in, x, layout), d_step.mul_(ctx.scale), by_offset, None, None, None


def _flattened(
    x: Tensor, step: Tensor, offset: Tensor | None, axis: int | None, layout: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x as (n,), or as (outer, channels, inner) with step and offset (channels, 1)."""
    x = _ordered(x.contiguous(memory_format=layout), layout)
    if axis is None:
        return x.view(-1), step, offset
    outer, inner = _around(x, axis)
    columns = None if offset is None else offset[:, None]
    return x.view(outer, step.numel(), inner), step[:, None], columns


def _ordered(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Return x with its dimensions in the order of its memory."""
    return x.permute(0, 2, 3, 1) if layout == torch.channels_last else x


def _like(y: Tensor, x: Tensor, layout: torch.memory_format) -> Tensor:
    """Return y, flattened in the order of memory, in the shape of x."""
    if layout == torch.channels_last:
        return y.view(_ordered(x, layout).shape).permute(0, 3, 1, 2)
    return y.view(x.shape)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def rounded(
        x: Tensor, step: Tensor, offset: Tensor | None, format: QuantFormat, axis: int | None
    ) -> Tensor:
        return _round(x, _Blocks(x, step, offset, format, axis))

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, *rest: Any) -> Tensor:
        format, axis, ctx.scale = rest
        ctx.blocks = _Blocks(x, step, offset, format, axis)
        ctx.save_for_backward(x, step, offset)
        return _round(x, ctx.blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, step, offset = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        g = _real(g).contiguous(memory_format=blocks.layout)
        g_in, d_step, d_offset = _gradients(g, _real(x), blocks)
        d_step = _toward(d_step.mul_(ctx.scale), step, low=STEP_FLOOR, high=inf)
        if offset is None:
            return g_in.to(x.dtype), d_step, None, None, None, None
        ends = (-inf, inf) if blocks.shifted else (blocks.qmin, blocks.qmax)
        d_offset = _toward(d_offset.mul_(ctx.scale), offset, low=ends[0], high=ends[1])
        return g_in.to(x.dtype), d_step, d_offset, None, None, None


def _real(x: Tensor) -> Tensor:
    """Return x in the dtype that grids are computed in: float32, or float64 if x is."""
    return x if x.dtype == torch.float64 else x.float()


def _toward(gradient: Tensor, parameter: Tensor, *, low: float, high: float) -> Tensor:
    """Return the gradient without what would drive a parameter beyond its bounds further out."""
    if (
        gradient.numel() == 1 and gradient.device.type == "cpu"
    ):  # the same in plain numbers: ten times as fast
        value, slope = parameter.item(), gradient.item()
        return gradient.zero_() if (value < low and slope > 0) or (value > high and slope < 0) else gradient
    stuck = ((parameter < low) & (gradient > 0)) | ((parameter > high) & (gradient < 0))
    return gradient.masked_fill_(stuck, 0.0)


def _layout(x: Tensor, axis: int | None) -> torch.memory_format:
    """Return the memory format of x that `_Blocks` can cut without a copy."""
    if x.dim() == 4 and axis in (None, 0) and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class _Blocks:
    """A grid, and how tensors of one shape and layout are cut into blocks for it, each with its step and
    zero.

    One step on a CPU: 1-D blocks, step and zero are numbers. Otherwise blocks of rows (r, n) with columns (r,
    1).
    """

    def __init__(
        self, x: Tensor, step: Tensor, offset: Tensor | None, format: QuantFormat, axis: int | None
    ) -> None:
        self.qmin, self.qmax, self.shifted = format.qmin, format.qmax, is_shifted(format)
        self.layout, self.channels = _layout(x, axis), step.numel()
        on_cpu = x.device.type == "cpu"
        values = _BLOCK * torch.get_num_threads() if on_cpu else max(1, x.numel())
        self.flat = axis is None and on_cpu
        if self.flat:
            self._cut_flat(x.numel(), values, make_grid(step, offset, format))
        else:
            self._cut_rows(*_around(x, axis), values, make_grid(step, offset, format))

    def _cut_flat(self, total: int, values: int, grid: Grid) -> None:
        count = max(1, -(-total // values))
        self.shape: tuple[int, ...] = (-1,)
        self.size = values
        self.steps: Sequence[Any] = [grid.step.item()] * count
        self.zeros: Sequence[Any] = [None if grid.zero is None else grid.zero.item()] * count

    def _cut_rows(self, outer: int, inner: int, values: int, grid: Grid) -> None:
        self.shape, self.size = (outer * self.channels, inner), max(1, values // max(1, inner))
        self.steps = self._split(_column(grid.step, outer))
        self.zeros = [None] * len(self.steps) if grid.zero is None else self._split(_column(grid.zero, outer))

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """Return the blocks of x, as views."""
        return self._split(_ordered(x, self.layout).view(self.shape))

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return (x,) if x.shape[0] <= self.size else torch.split(x, self.size)

    def total(self, parts: list[Tensor]) -> Tensor:
        """Return (channels,): the sum over all blocks of what was computed for each, () or (r,)."""
        if len(parts) == 1 and parts[0].numel() == self.channels:
            return parts[0].reshape(self.channels)
        return (torch.stack(parts) if self.flat else torch.cat(parts)).view(-1, self.channels).sum(0)


def _column(x: Tensor, times: int) -> Tensor:
    """Return x (n,) repeated as one column, (times * n, 1)."""
    return (x if times == 1 else x.repeat(times))[:, None]


def _around(x: Tensor, axis: int | None) -> tuple[int, int]:
    """Return how many times the steps repeat before `axis`, and how many values share one after it."""
    if axis is None:
        return 1, x.numel()
    axis %= x.dim()
    return prod(x.shape[:axis]), prod(x.shape[axis + 1 :])


def _round(x: Tensor, blocks: _Blocks) -> Tensor:
    """Return x, which has the layout of the blocks, rounded to their grid."""
    real = _real(x)
    y = torch.empty_like(real)
    if x.numel():
        for xs, ys, step, zero in zip(
            blocks.cut(real), blocks.cut(y), blocks.steps, blocks.zeros, strict=True
        ):
            torch.div(xs, step, out=ys)
            _count(ys, zero, blocks).mul_(step)
    return y.to(x.dtype)


def _count(scaled: Tensor, zero: Any, grid: _Blocks) -> Tensor:
    """Turn x / step into (q - zero), in place."""
    if zero is None:
        return scaled.round_().clamp_(grid.qmin, grid.qmax)
    if grid.shifted:
        return scaled.add_(zero).round_().clamp_(grid.qmin, grid.qmax).sub_(zero)
    if isinstance(zero, float):
        return scaled.round_().clamp_(grid.qmin - zero, grid.qmax - zero)
    return scaled.round_().add_(zero).clamp_(grid.qmin, grid.qmax).sub_(zero)


def _gradients(g: Tensor, x: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return g_in (as x), sum g dy/dstep and sum g dy/doffset, (channels,) each (zeros without an offset)."""
    g_in = torch.empty_like(x)
    if not x.numel():
        return g_in, x.new_zeros(blocks.channels), x.new_zeros(blocks.channels)
    by_step, by_offset = [], []
    of_block = _flat_block if blocks.flat else _row_block
    for gs, xs, inside, step, zero in zip(
        *(blocks.cut(tensor) for tensor in (g, x, g_in)), blocks.steps, blocks.zeros, strict=True
    ):
        by_step.append(of_block(gs, xs, step, zero, blocks, out=inside))
        if zero is not None:
            by_offset.append((inside.sum(-1) - gs.sum(-1)) * (step if blocks.flat else step[:, 0]))
    d_step = blocks.total(by_step)
    return g_in, d_step, blocks.total(by_offset) if by_offset else d_step.new_zeros(blocks.channels)


def _flat_block(
    g: Tensor, x: Tensor, step: float, zero: float | None, grid: _Blocks, *, out: Tensor
) -> Tensor:
    """Write g_in of a 1-D block to `out`, and return its sum g dy/dstep, ()."""
    shift = zero or 0.0
    low, high = (grid.qmin - shift) * step, (grid.qmax - shift) * step
    _keep(g, x, _just_beyond(low, -inf), _just_beyond(high, inf), grad_input=out)
    number = _count(x / step, zero, grid)
    return torch.dot(g, number) - torch.dot(out, x) / step


def _row_block(
    g: Tensor, x: Tensor, step: Tensor, zero: Tensor | None, grid: _Blocks, *, out: Tensor
) -> Tensor:
    """Write g_in of a block of rows to `out`, and return its sums g dy/dstep, (r,)."""
    work = x / step
    if zero is not None:
        work.add_(zero)
    _keep(g, work, _just_beyond(grid.qmin, -inf), _just_beyond(grid.qmax, inf), grad_input=out)
    by_range = torch.mul(out, x, out=work).sum(1) / step[:, 0]
    number = _count(torch.div(x, step, out=work), zero, grid)
    return number.mul_(g).sum(1) - by_range


_keep = (
    torch.ops.aten.hardtanh_backward.grad_input
)  # writes g where low < x < high and 0 elsewhere, in one pass


def _just_beyond(end: float, direction: float) -> float:
    """Return the next float32 from `end`, and for 0 the next that flushing denormals leaves alone."""
    return float(np.nextafter(np.float32(end), np.float32(direction))) if end else copysign(_TINY, direction)
