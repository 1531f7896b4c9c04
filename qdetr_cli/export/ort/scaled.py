"""A product of codes with constant codes, and what follows it, as ONNX Runtime fuses it to one kernel.

MatMulInteger, Cast, a factor per column and a bias become MatMulIntegerToFloat, whose bias is a real number:
that of the fake-quant model. The runtime looks for a factor that is itself a product (of the step of x and
those of the weights), and would fold two constants to one before it looks. It leaves DequantizeLinear alone,
so the factor is written as `unit`, the code 1 dequantized, times the steps of the products.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import Array, Dims, Editor
from qdetr_cli.export.ort.pairs import Operand

FLOAT = ir.DataType.FLOAT
_UNIT = "unit"


def real_product(
    editor: Editor,
    x: Operand,
    weight: Array,
    step: Array,
    bias: ir.Value | None,
    *,
    before: ir.Node,
    name: str,
    kind: str | None = None,
) -> ir.Value:
    """x (.., D_in), with one step, times weight (D_in, D_out) with steps (D_out,), plus the bias."""
    assert x.axis is None
    shape = [] if x.codes.shape is None else [*x.codes.shape[:-1], weight.shape[1]]
    given, point = editor.operand(x.codes, x.zero, f"{name}.input.codes")
    codes, zero = editor.kernel(weight, (), f"{name}.weight")
    operands = [given, codes, editor.constant(point.reshape(()), f"{name}.input.zero_point")]
    if zero:
        operands.append(editor.constant(zero, f"{name}.weight.zero_point"))
    steps = x.step.reshape(()) * step
    y = scaled_product(editor, operands, steps, shape or None, before=before, name=name, kind=kind)
    if bias is None:
        return y
    return editor.node("Add", [y, bias], before=before, name=f"{name}.bias", shape=y.shape, dtype=FLOAT)


def scaled_product(
    editor: Editor,
    operands: Sequence[ir.Value],
    steps: Array,
    shape: Dims | None,
    *,
    before: ir.Node,
    name: str,
    kind: str | None = None,
) -> ir.Value:
    """A MatMulInteger of these operands, times steps (), (columns,) or (.., 1, columns)."""
    y = editor.node(
        "MatMulInteger", operands, before=before, name=name, shape=shape, dtype=ir.DataType.INT32, kind=kind
    )
    y = editor.node("Cast", [y], before=before, name=f"{name}.real", shape=shape, dtype=FLOAT, to=int(FLOAT))
    factor = _factor(editor, steps, before=before, name=name)
    return editor.node("Mul", [y, factor], before=before, name=f"{name}.scaled", shape=shape, dtype=FLOAT)


def _factor(editor: Editor, step: Array, *, before: ir.Node, name: str) -> ir.Value:
    """The steps of the products (D_out,), as a product of two; stored anew, for none may be shared."""
    steps = editor.own(step.astype(np.float32), f"{name}.steps")
    return editor.node(
        "Mul", [_unit(editor), steps], before=before, name=f"{name}.factor", shape=step.shape, dtype=FLOAT
    )


def _unit(editor: Editor) -> ir.Value:
    """The number 1, computed."""
    for node in editor.graph:
        if node.name == _UNIT:
            return node.outputs[0]
    one = editor.constant(np.array(1, np.uint8), "code.one")
    scale = editor.constant(np.array(1, np.float32), "one")
    first = next(iter(editor.graph))
    read = editor.node(
        "DequantizeLinear", [one, scale], before=first, name="unit.read", shape=[], dtype=FLOAT
    )
    return editor.node("Abs", [read], before=first, name=_UNIT, shape=[], dtype=FLOAT)
