"""Products of two quantized activations, as in attention, in integers.

    sum (a s_a) (b s_b) = s_a s_b sum a b

with a and b whole numbers of eight bits. OpenVINO multiplies two activations in integers where each has one
step and no zero point, so steps per head are taken out before and put back after. The numbers of an
asymmetric grid of eight bits span nine; shifted by whole z into eight, they are a = a' - z_a, and

    sum a b = sum a' b' - z_b sum a' - z_a sum b' + K z_a z_b,    K numbers in each sum
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qdetr_cli.export.openvino_grids import (
    Array,
    Numbers,
    constant_numbers,
    hidden,
    integers,
    number,
    numbers,
    whole,
)
from qdetr_cli.export.program import Rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One side of a product: whole numbers plus shift, as an output, and their steps."""

    codes: Any
    shift: Array
    step: Array


def integer_product(product: Any, first: Rounding, second: Rounding, *, real: bool = False) -> Any:
    """The node that stands for a MatMul whose two inputs are stand-ins of quantizers.

    `real`: the whole numbers are multiplied as floats, whose sums are whole too.
    """
    from openvino import opset13 as op

    left = _operand(product.input_value(0).get_node(), first)
    right = _operand(product.input_value(1).get_node(), second)
    flags = product.get_attributes()
    assert not flags["transpose_a"]
    assert not flags["transpose_b"]
    result = op.matmul(left.codes, hidden(right.codes) if real else right.codes, False, False)
    length = left.codes.get_output_shape(0)[-1] if left.shift.any() and right.shift.any() else 0
    for own, other, axis in ((left, right, -1), (right, left, -2)):
        if other.shift.any():
            sums = op.reduce_sum(own.codes, np.array([axis], np.int64), True)
            result = op.subtract(result, op.multiply(sums, number(other.shift)))
    if length:
        result = op.add(result, number(length * left.shift * right.shift))
    scaled = op.multiply(result, number(left.step * right.step))
    scaled.set_friendly_name(product.get_friendly_name())
    return scaled


def _operand(source: Any, rounding: Rounding) -> Operand:
    """What the stand-in of a quantizer becomes: a FakeQuantize, or the numbers of a constant."""
    grid = numbers(rounding, len(source.output(0).get_partial_shape()))
    shift = _shift(grid)
    if rounding.constant is None:
        codes = whole(source.input_value(0), grid, shift)
    else:
        codes = integers(constant_numbers(rounding)[0] + shift)
    return Operand(codes=codes, shift=shift, step=grid.step)


def _shift(grid: Numbers) -> Array:
    """What moves the numbers of the grid into eight bits: 0 where they fit."""
    fits = grid.fits_signed or grid.fits_unsigned
    return np.zeros_like(grid.low) if fits else -(grid.low + 128)
