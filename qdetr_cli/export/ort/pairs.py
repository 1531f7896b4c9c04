"""The quantizers of a graph: read them, merge equal ones, and move them up to where integers begin.

A quantizer is QuantizeLinear, a Clip of the codes where its grid has fewer than 256 of them, and
DequantizeLinear. `hoist` moves it above operations that only pick or move values (pooling, concatenation,
reshape, ...), which then run on integers, and so that it meets the convolution that computes the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import Array, Editor, array_of, attribute, attributes_of, consumers, replace

_CODES = (ir.DataType.UINT8, ir.DataType.INT8)
_MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Identity"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Codes low..high that stand for (code - zero) * step; step and zero have one entry or one per `axis`."""

    step: Array  # float32
    zero: Array  # of the codes' type
    axis: int | None
    low: int
    high: int

    @property
    def key(self) -> tuple[bytes, bytes, str, int | None, int, int]:
        """Equal for equal grids."""
        kind = self.zero.dtype.str
        return self.step.tobytes(), self.zero.tobytes(), kind, self.axis, self.low, self.high

    @property
    def kind(self) -> ir.DataType:
        """The type of the codes."""
        return ir.DataType.from_numpy(self.zero.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Where a value becomes codes: a QuantizeLinear, and the Clip that may follow."""

    quantize: ir.Node
    codes: ir.Value
    grid: Grid

    @property
    def name(self) -> str:
        """The name of the quantizer."""
        return (self.quantize.name or "").removesuffix(".quantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """Codes that a DequantizeLinear reads, computed or constant."""

    codes: ir.Value
    step: Array
    zero: Array
    axis: int | None

    @property
    def constant(self) -> Array | None:
        """The codes as numbers, where they are constant."""
        return array_of(self.codes)


def operand(value: ir.Value | None) -> Operand | None:
    """What a value is dequantized from; None for a value that is not."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Mul":
        return _by_axis(node)
    if node.op_type != "DequantizeLinear":
        return None
    codes, step = node.inputs[0], array_of(node.inputs[1])
    assert codes is not None
    if step is None or codes.dtype not in _CODES:
        return None
    zero = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is None:
        zero = np.zeros(step.shape, codes.dtype.numpy())
    axis = int(attribute(node, "axis", 1)) if step.ndim else None
    return Operand(codes=codes, step=step, zero=zero, axis=axis)


def _by_axis(multiply: ir.Node) -> Operand | None:
    """The same where it is written as Mul(Sub(Cast(codes), zero), step), with steps for one dimension."""
    subtract = _made_by(multiply.inputs[0], "Sub")
    cast = None if subtract is None else _made_by(subtract.inputs[0], "Cast")
    step = array_of(multiply.inputs[1])
    zero = None if subtract is None else array_of(subtract.inputs[1])
    codes = None if cast is None else cast.inputs[0]
    if codes is None or codes.dtype not in _CODES or step is None or zero is None or step.shape != zero.shape:
        return None
    axes = [place for place, size in enumerate(step.shape) if size > 1]
    if len(axes) > 1:
        return None
    shape = (-1,) if axes else ()
    return Operand(
        codes=codes,
        step=step.reshape(shape),
        zero=zero.reshape(shape).astype(codes.dtype.numpy()),
        axis=axes[0] if axes else None,
    )


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def rounding_of(node: ir.Node) -> Rounding | None:
    """The quantizer that begins with this node; None where none does, or its grid is not constant."""
    if node.op_type != "QuantizeLinear":
        return None
    step, zero, codes = array_of(node.inputs[1]), array_of(node.inputs[2]), node.outputs[0]
    if step is None or zero is None or codes.is_graph_output():
        return None
    info = np.iinfo(zero.dtype)
    low, high = int(info.min), int(info.max)
    following = consumers(codes)
    if len(following) == 1 and following[0].op_type == "Clip":
        ends = [array_of(each) for each in following[0].inputs[1:3]]
        low, high = (int(end) if end is not None else own for end, own in zip(ends, (low, high), strict=True))
        codes = following[0].outputs[0]
    axis = int(attribute(node, "axis", 1)) if step.ndim else None
    grid = Grid(step=step, zero=zero, axis=axis, low=low, high=high)
    return Rounding(quantize=node, codes=codes, grid=grid)


def roundings_of(value: ir.Value) -> list[Rounding]:
    """The quantizers that read a value, if nothing else does; else none."""
    if value.is_graph_output():
        return []
    found = [rounding_of(node) for node in consumers(value)]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else []


def quantized(editor: Editor, value: ir.Value, grid: Grid, *, before: ir.Node, name: str) -> ir.Value:
    """The codes of a value."""
    axis = {} if grid.axis is None else {"axis": grid.axis}
    ends = (editor.constant(grid.step, f"{name}.scale"), editor.constant(grid.zero, f"{name}.zero_point"))
    codes = editor.node(
        "QuantizeLinear",
        [value, *ends],
        before=before,
        name=f"{name}.quantize",
        shape=value.shape,
        dtype=grid.kind,
        attributes=axis,
    )
    return clipped(editor, codes, grid.low, grid.high, before=before, name=name)


def clipped(editor: Editor, codes: ir.Value, low: int, high: int, *, before: ir.Node, name: str) -> ir.Value:
    """Codes cut to low..high; as they are where their type does it."""
    kind = codes.dtype
    assert kind is not None
    info = np.iinfo(kind.numpy())
    if low <= info.min and high >= info.max:
        return codes
    ends = [editor.constant(np.array(end, kind.numpy()), f"code.{kind.name}.{end}") for end in (low, high)]
    return editor.node(
        "Clip", [codes, *ends], before=before, name=f"{name}.clip", shape=codes.shape, dtype=kind
    )


def dequantized(
    editor: Editor, codes: ir.Value, step: Array, zero: Array, axis: int | None, *, before: ir.Node, name: str
) -> ir.Value:
    """The real values of codes."""
    inputs = [codes, editor.constant(step, f"{name}.scale"), editor.constant(zero, f"{name}.zero_point")]
    place = {} if axis is None else {"axis": axis}
    return editor.node(
        "DequantizeLinear",
        inputs,
        before=before,
        name=f"{name}.dequantize",
        shape=codes.shape,
        dtype=ir.DataType.FLOAT,
        attributes=place,
    )


def merge(graph: ir.Graph) -> None:
    """Let equal quantizers of one value be one, and leave out those of values that lie on their grid."""
    for node in list(graph):
        found = rounding_of(node)
        read = None if found is None else operand(node.inputs[0])
        if found is not None and read is not None and _lies_on(read, found.grid):
            replace(found.codes, read.codes)
    for value in list(_values(graph)):
        seen: dict[object, Rounding] = {}
        for node in consumers(value):
            found = rounding_of(node)
            if found is not None:
                first = seen.setdefault(found.grid.key, found)
                if first is not found:
                    replace(found.codes, first.codes)
    graph.sort()
    remove_unused(graph)


def _lies_on(values: Operand, grid: Grid) -> bool:
    """Whether values are those of the same codes of a grid."""
    made = values.codes.producer()
    before = None if made is None else made.inputs[0] if made.op_type == "Clip" else made.outputs[0]
    source = None if before is None else before.producer()
    rounded = None if source is None else rounding_of(source)
    return rounded is not None and rounded.codes is values.codes and rounded.grid.key == grid.key


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node and the quantizers that read it, which nothing reads any more."""
    for reader in consumers(node.outputs[0]):
        graph.remove([*consumers(reader.outputs[0]), reader], safe=True)
    graph.remove(node, safe=True)


def remove_unused(graph: ir.Graph) -> None:
    """Remove the nodes that no output depends on."""
    for node in reversed(list(graph)):
        if not any(each.uses() or each.is_graph_output() for each in node.outputs):
            graph.remove(node, safe=True)


def hoist(editor: Editor) -> None:
    """Move quantizers above what only moves values and above ReLU, where nothing else reads the result."""
    for node in reversed(list(editor.graph)):
        if node.op_type in _MOVES or node.op_type == "Relu":
            found = roundings_of(node.outputs[0])
            if found and all(each.grid.axis is None for each in found):
                for each in found:
                    (_into if node.op_type == "Relu" else _above)(editor, node, each)
                _remove(editor.graph, node)


def _into(editor: Editor, relu: ir.Node, rounding: Rounding) -> None:
    """Let the codes begin with that of 0 instead."""
    grid, x = rounding.grid, relu.inputs[0]
    assert x is not None
    low = min(max(grid.low, int(grid.zero)), grid.high)
    codes = quantized(editor, x, replace_fields(grid, low=low), before=relu, name=rounding.name)
    replace(rounding.codes, codes)


def _above(editor: Editor, node: ir.Node, rounding: Rounding) -> None:
    """Quantize what `node` moves, and let it move the codes."""
    moved = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    codes = [
        quantized(editor, value, rounding.grid, before=node, name=f"{rounding.name}.{place}")
        for place, value in enumerate(moved)
        if value is not None
    ]
    done = editor.node(
        node.op_type,
        [*codes, *node.inputs[len(codes) :]],
        before=node,
        name=f"{rounding.name}.{node.op_type.lower()}",
        shape=node.outputs[0].shape,
        dtype=rounding.grid.kind,
        attributes=attributes_of(node),
    )
    replace(rounding.codes, done)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
