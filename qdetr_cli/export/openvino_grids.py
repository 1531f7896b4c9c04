"""Rounding to a grid in the forms that OpenVINO's CPU compiler takes for integers.

It reads a FakeQuantize of 256 levels, or of 16, as eight bits. With another count the layer that follows
stays float, so such a grid keeps 256 levels and is clamped to its own ends before.

Numbers of a grid are whole numbers n = q - zero here, low <= n <= high, and 0 stands for 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdetr_cli.export.program import Rounding
from qdetr_cli.instructions import SAFE_BITS

Array = NDArray[np.float32]

LEVELS = 256
KNOWN_LEVELS = (16, LEVELS)  # that the low-precision passes of OpenVINO 2026.4 take


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The whole numbers of a grid and their steps; each array broadcasts against what is rounded."""

    step: Array
    low: Array
    high: Array

    @property
    def count(self) -> int:
        """How many numbers the grid has."""
        return int((self.high - self.low).max()) + 1

    @property
    def fits_signed(self) -> bool:
        """Whether all of them are in -128..127."""
        return bool(self.low.min() >= -128 and self.high.max() <= 127)

    @property
    def fits_unsigned(self) -> bool:
        """Whether all of them are in 0..255."""
        return bool(self.low.min() >= 0 and self.high.max() <= 255)


def numbers(rounding: Rounding, rank: int) -> Numbers:
    """The numbers of a grid, for a tensor of this rank."""
    grid, axis = rounding.grid, rounding.axis
    shape = [1] * rank
    if axis is None:
        shape = []
    else:
        shape[axis] = -1
    step = grid.step.numpy().reshape(shape).astype(np.float32)
    zero = np.zeros_like(step) if grid.zero is None else grid.zero.numpy().reshape(shape).astype(np.float32)
    return Numbers(step=step, low=grid.qmin - zero, high=grid.qmax - zero)


def is_wide(rounding: Rounding) -> bool:
    """Whether two products of its numbers and uint8 may be beyond 16 bits."""
    grid = numbers(rounding, rank=8)
    return bool(max(-grid.low.min(), grid.high.max()) > 2 ** (SAFE_BITS - 1))


def constant_numbers(rounding: Rounding) -> tuple[Array, Array]:
    """The numbers of what is rounded before anything runs, shaped as it, and their steps, to broadcast."""
    grid, axis = rounding.grid, rounding.axis
    assert rounding.constant is not None
    codes = grid.integers(rounding.constant, axis)
    own = numbers(rounding, codes.dim())
    zero = grid.qmin - own.low
    return codes.numpy().astype(np.float32) - zero, own.step


def rounded(x: Any, grid: Numbers) -> Any:
    """The node that rounds x, an output, to the values of the grid."""
    from openvino import opset13 as op

    low, high = grid.low, grid.high
    if grid.count not in KNOWN_LEVELS:
        x = clamped(x, low * grid.step, high * grid.step)
        low, high = _widened(grid)
    ends = number(low * grid.step), number(high * grid.step)
    return op.fake_quantize(x, *ends, *ends, grid.count if grid.count in KNOWN_LEVELS else LEVELS)


def _widened(grid: Numbers) -> tuple[Array, Array]:
    """The ends of a grid of 256 numbers that contains this one, without a zero point if this has none."""
    signed = grid.low == -(grid.high + 1)
    low = np.where(signed, np.float32(-LEVELS // 2), grid.low)
    return low, low + np.float32(LEVELS - 1)


def whole(x: Any, grid: Numbers, shift: Array) -> Any:
    """The node that rounds x to numbers n + shift, as floats: within -128..127, or within 0..255.

    The compiler would draw a multiplication by steps per head into the FakeQuantize, and then find no single
    step; the Minimum between keeps it out, as no Clamp does.
    """
    from openvino import opset13 as op

    y = op.multiply(x, number(1 / grid.step))
    y = op.add(y, number(shift)) if shift.any() else y
    low, high = grid.low + shift, grid.high + shift
    ends = (0, LEVELS - 1) if low.min() >= 0 else (-LEVELS // 2, LEVELS // 2 - 1)
    y = op.maximum(y, _bound(low)) if (low > ends[0]).any() else y
    y = op.minimum(y, _bound(high))
    inputs = [number(end) for end in ends]
    return op.fake_quantize(y, *inputs, *inputs, LEVELS)


def hidden(x: Any) -> Any:
    """Whole numbers up to 255 as they are, past which the compiler does not look for integers."""
    from openvino import opset13 as op

    return op.minimum(x, number(float(LEVELS)))


def _bound(ends: Array) -> Any:
    """The ends of a grid, as one number if all are alike: only then does the compiler fuse an attention."""
    return number(ends if (ends != ends.flat[0]).any() else ends.flat[0])


def clamped(x: Any, low: Array, high: Array) -> Any:
    """The node that limits x to low..high."""
    from openvino import opset13 as op

    if low.size == 1:
        return op.clamp(x, float(low.item()), float(high.item()))
    return op.minimum(op.maximum(x, number(low)), number(high))


def stored(codes: Array, step: Array, name: str) -> Any:
    """The node that gives numbers times step; the file holds the numbers as integers of eight bits."""
    from openvino import opset13 as op

    product = op.multiply(integers(codes), number(step))
    product.set_friendly_name(name)
    return product


def integers(codes: Array) -> Any:
    """The node that gives whole numbers within -128..127 or 0..255 as floats, kept as int8 or uint8."""
    import openvino
    from openvino import opset13 as op

    kind = np.int8 if codes.min(initial=0) >= -128 and codes.max(initial=0) <= 127 else np.uint8
    assert (codes == codes.astype(kind)).all()
    return op.convert(op.constant(codes.astype(kind)), openvino.Type.f32)


def number(value: Any) -> Any:
    """A float constant."""
    from openvino import opset13 as op

    return op.constant(np.asarray(value, dtype=np.float32))
