"""Products of two activations, as in attention, in the form that ONNX Runtime runs on integers.

They are uint8 by int8 (by uint8 in portable files), as `scaled` has it, with a step for each column of each
head, into which the scale of the attention goes. Where sizes are free, codes are dequantized with step 1,
multiplied, and scaled after. (DequantizeLinear with a step per head before a MatMul becomes a kernel that
fails when it runs.)

One zero point for all heads goes into that kernel. Zero points that differ are moved to one, where the codes
still fit; else (a + da)(b + db) = ab + da colsum(b + db) + db rowsum(a), with a and b what the kernel sees,
and the last term left out before a softmax, which it cannot change.
"""

from dataclasses import dataclass
from dataclasses import replace as replaced

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import (
    MIDDLE,
    Array,
    Editor,
    array_of,
    attribute,
    consumers,
    dims,
    replace,
    shaped,
    static,
)
from qdetr_cli.export.ort.pairs import Operand, Rounding, dequantized, operand, rounding_of
from qdetr_cli.export.ort.scaled import scaled_product

_ONE = np.ones((), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """An operand as the kernel takes it: codes - point; `missing` is what the real zero points add."""

    codes: ir.Value
    point: Array  # (), of the codes' type
    missing: Array  # (1 or heads, 1, 1), float32
    step: Array  # likewise
    operand: Operand


def integer_products(editor: Editor) -> None:
    """Bring every product of codes with codes into that form."""
    for node in list(editor.graph):
        if node.op_type == "MatMul":
            a, b = operand(node.inputs[0]), operand(node.inputs[1])
            if a is not None and b is not None and _by_batch(a) and _by_batch(b):
                _place(editor, node, a, b)
    editor.graph.sort()


def _by_batch(side: Operand) -> bool:
    """Whether its steps, if there are several, belong to dimensions that are not multiplied."""
    rank = len(side.codes.shape or ())
    return rank >= 2 and (side.axis is None or side.axis % rank < rank - 2)


def _place(editor: Editor, node: ir.Node, a: Operand, b: Operand) -> None:
    left = _side(editor, node, a, np.dtype(np.uint8), "a")
    right = _side(editor, node, b, editor.weights, "b")
    end, scale = _scaled(node.outputs[0])
    steps = (left.step * right.step * scale).astype(np.float32)
    y, rest = _multiplied(editor, node, left, right, steps)
    for number, term in enumerate(_terms(editor, node, left, right, steps / rest)):
        y = _combined(editor, node, "Add", y, term, f"{node.name}.term{number}")
    if rest is not _ONE:
        y = _combined(
            editor, node, "Mul", y, editor.constant(rest, f"{node.name}.steps"), f"{node.name}.scaled"
        )
    replace(end, y)


def _multiplied(
    editor: Editor, node: ir.Node, left: Side, right: Side, steps: Array
) -> tuple[ir.Value, Array]:
    """The product of what the kernel sees, and the steps that it does not have yet.

    Where all sizes are known each column of each head gets its step in the kernel.
    """
    name, shape = node.name or "product", dims(node.outputs[0])
    if shape is not None and static(shape) and right.operand.codes.shape is not None:
        columns = np.broadcast_to(steps, (*shape[:-2], 1, shape[-1]))
        points = [editor.constant(side.point, f"{name}.zero_point") for side in (left, right)]
        y = scaled_product(
            editor,
            [left.codes, right.codes, *points],
            columns if steps.size > 1 else steps.reshape(()),
            shape,
            before=node,
            name=name,
        )
        return y, _ONE
    real = [_real(editor, node, side, place) for side, place in ((left, "a"), (right, "b"))]
    y = editor.node(
        "MatMul", real, before=node, name=name, shape=node.outputs[0].shape, dtype=ir.DataType.FLOAT
    )
    return y, steps


def _combined(editor: Editor, node: ir.Node, op: str, x: ir.Value, y: ir.Value, name: str) -> ir.Value:
    return editor.node(op, [x, y], before=node, name=name, shape=x.shape, dtype=ir.DataType.FLOAT)


def _scaled(product: ir.Value) -> tuple[ir.Value, Array]:
    """The product after the one number that multiplies it next, if any does, and that number."""
    readers = consumers(product)
    if len(readers) == 1 and readers[0].op_type == "Mul" and not product.is_graph_output():
        other = next((each for each in readers[0].inputs if each is not product), None)
        number = array_of(other)
        if number is not None and number.size == 1:
            return readers[0].outputs[0], number.reshape(())
    return product, np.ones((), np.float32)


def _side(editor: Editor, node: ir.Node, side: Operand, kind: np.dtype[np.generic], place: str) -> Side:
    """The operand with one zero point and codes of `kind`, as far as that can be."""
    heads = (-1, 1, 1) if side.axis is not None else ()
    zero, step = side.zero.astype(np.int32), side.step.reshape(heads)
    made = side.codes.producer()
    rounding = None if made is None else rounding_of(made) or _before(made)
    name = f"{node.name}.{place}"
    if rounding is None:
        codes, zeros = editor.operand(side.codes, side.zero, f"{name}.codes")
        side = replaced(side, codes=codes, zero=zeros)
        zero = zeros.astype(np.int32)
        point = _common(zero, side.zero.dtype)
        missing = (point.astype(np.int32) - zero).reshape(heads).astype(np.float32)
        return Side(codes=side.codes, point=point, missing=missing, step=step, operand=side)
    shift = MIDDLE if kind == np.int8 and side.zero.dtype == np.uint8 else 0
    ends = np.array([rounding.grid.low, rounding.grid.high]) - shift
    zero = zero - shift
    point = _common(zero, kind)
    moved = point.astype(np.int32) - zero  # what codes gain when every head has this zero point
    info = np.iinfo(point.dtype)
    fits = bool((ends[0] + moved >= info.min).all() and (ends[1] + moved <= info.max).all())
    points, limits = (
        (zero, ends[:, None]) if not fits else (zero + moved, ends[:, None] + moved.reshape(1, -1))
    )
    x = rounding.quantize.inputs[0]
    assert x is not None
    axis = {} if side.axis is None else {"axis": side.axis}
    codes = editor.node(
        "QuantizeLinear",
        [
            x,
            editor.constant(side.step, f"{name}.scale"),
            editor.constant(points.astype(kind), f"{name}.zero_point"),
        ],
        before=node,
        name=f"{rounding.name}.quantize",
        shape=x.shape,
        dtype=ir.DataType.from_numpy(kind),
        attributes=axis,
    )
    rank = len(x.shape or ())
    for op, limit, free in (("Max", limits[0], info.min), ("Min", limits[1], info.max)):
        if (limit != free).any():
            bound = _along(np.broadcast_to(limit, zero.shape).astype(kind), side.axis, rank)
            codes = editor.node(
                op,
                [codes, editor.constant(bound, f"{name}.{op.lower()}")],
                before=node,
                name=f"{rounding.name}.{op.lower()}",
                shape=x.shape,
                dtype=ir.DataType.from_numpy(kind),
            )
    lacking: Array = np.zeros_like(zero) if fits else moved
    seen = Operand(codes=codes, step=side.step, zero=points.astype(kind), axis=side.axis)
    return Side(
        codes=codes,
        point=point,
        missing=lacking.reshape(heads).astype(np.float32),
        step=step,
        operand=seen,
    )


def _before(clip: ir.Node) -> Rounding | None:
    """The quantizer whose Clip this is."""
    source = clip.inputs[0].producer() if clip.op_type == "Clip" and clip.inputs[0] is not None else None
    return None if source is None else rounding_of(source)


def _common(zero: Array, kind: np.dtype[np.generic]) -> Array:
    """The zero point that all heads share, else the middle of the codes, ()."""
    if (zero == zero.reshape(-1)[0]).all():
        return np.array(zero.reshape(-1)[0], kind)
    return np.array(MIDDLE if kind == np.uint8 else 0, kind)


def _along(values: Array, axis: int | None, rank: int) -> Array:
    return values if axis is None else values.reshape(shaped({axis % rank: -1}, rank))


def _real(editor: Editor, node: ir.Node, side: Side, place: str) -> ir.Value:
    """The codes less their point, in real numbers."""
    one = np.ones((), np.float32)
    return dequantized(editor, side.codes, one, side.point, None, before=node, name=f"{node.name}.{place}")


def _terms(editor: Editor, node: ir.Node, left: Side, right: Side, steps: Array) -> list[ir.Value]:
    """What zero points that differ add to the product, times these steps."""
    terms, name = [], f"{node.name}.sums"
    if left.missing.any():
        b = right.operand
        one = np.ones_like(b.step)
        exact = dequantized(editor, b.codes, one, b.zero, b.axis, before=node, name=f"{name}.b")
        terms.append(_weighted_sum(editor, node, exact, -2, left.missing * steps, f"{name}.columns"))
    if right.missing.any() and not _before_softmax(node.outputs[0]):
        a = _real(editor, node, left, "a")
        terms.append(_weighted_sum(editor, node, a, -1, right.missing * steps, f"{name}.rows"))
    return terms


def _weighted_sum(
    editor: Editor, node: ir.Node, x: ir.Value, axis: int, weight: Array, name: str
) -> ir.Value:
    axes = editor.constant(np.array([axis], np.int64), "axes")
    total = editor.node("ReduceSum", [x, axes], before=node, name=name, dtype=ir.DataType.FLOAT, keepdims=1)
    shape = dims(x)
    total.shape = None if shape is None else ir.Shape([*shape[:axis], 1, *(shape[-1:] if axis == -2 else ())])
    return _combined(
        editor, node, "Mul", total, editor.constant(weight, f"{name}.points"), f"{name}.weighted"
    )


def _before_softmax(value: ir.Value) -> bool:
    """Whether a softmax over the last dimension follows, with nothing but one factor and sums in between."""
    readers = consumers(value)
    while len(readers) == 1 and readers[0].op_type in ("Mul", "Add"):
        node = readers[0]
        other = next((array_of(each) for each in node.inputs if each is not value), None)
        if node.op_type == "Mul" and (other is None or other.size != 1):
            return False
        value = node.outputs[0]
        readers = consumers(value)
    if len(readers) != 1 or readers[0].op_type != "Softmax":
        return False
    return attribute(readers[0], "axis", -1) in (-1, len(value.shape or ()) - 1)
