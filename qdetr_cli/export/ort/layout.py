"""Images with channels last, from the first integer convolution on, with as few transpositions as can be.

ONNX knows convolutions of (B, D, h, w) alone, and ONNX Runtime's integer ones want (B, h, w, D): it puts a
transposition on both sides of each, and those between two convolutions cancel. Between a convolution and
anything else they stay, on real values too, which costs more than the arithmetic. So the graph is put in
that layout beforehand: each image has a twin with channels last, every node that can work on twins does, and
a pooling, as convolutions are, is left between two transpositions of codes, which cancel the runtime's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import (
    Editor,
    array_of,
    attribute,
    attributes_of,
    dims,
    replace,
    static,
)

_ELEMENTWISE = frozenset(
    {
        *(
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Relu",
            "LeakyRelu",
            "Sigmoid",
            "Tanh",
            "HardSigmoid",
            "HardSwish",
            "Gelu",
        ),
        *("Erf", "Sqrt", "Pow", "Exp", "Neg", "Clip", "Min", "Max", "Cast", "Identity", "Softplus", "Elu"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}  # from channels first to channels last, by rank
FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2)}
_INTEGERS = (ir.DataType.UINT8, ir.DataType.INT8)


def channels_last(editor: Editor) -> None:
    """Put the graph in that layout."""
    _Sweep(editor).run()


class _Sweep:
    """One pass in order. `twins` has, for a value (B, D, ..), the value (B, .., D)."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.twins: dict[ir.Value, ir.Value] = {}
        self.rules: dict[str, Callable[[ir.Node], None]] = {
            "Transpose": self._transpose,
            "MaxPool": self._framed,
            "Concat": self._concat,
            "Reshape": self._reshape,
            "Resize": self._resize,
            "AveragePool": self._average,
        }

    def run(self) -> None:
        """Visit every node that is there now."""
        for node in list(self.editor.graph):
            rule = self._elementwise if node.op_type in _ELEMENTWISE else self.rules.get(node.op_type)
            if rule is not None:
                rule(node)
        self.editor.graph.sort()

    def _made(self, node: ir.Node, twin: ir.Value) -> None:
        """Let `twin` compute what the node did; what still reads channels first reads its transposition."""
        old = node.outputs[0]
        rank = len(old.shape or ())
        twin.shape, twin.type = ir.Shape([(old.shape or ())[each] for each in LAST[rank]]), old.type
        back = self.editor.transposed(twin, FIRST[rank], before=node, name=f"{node.name}.first")
        back.shape, back.type = old.shape, old.type
        replace(old, back)
        self.twins[back] = twin

    def _twin(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """The twin of a value, made before `node` if there is none yet."""
        if value not in self.twins:
            order = LAST[len(value.shape or ())]
            self.twins[value] = self.editor.transposed(value, order, before=node, name=f"{value.name}.last")
        return self.twins[value]

    def _has_twin(self, value: ir.Value | None) -> bool:
        return value is not None and value in self.twins

    def _transpose(self, node: ir.Node) -> None:
        """A transposition to or from channels last only renames."""
        x, order = node.inputs[0], tuple(attribute(node, "perm", ()))
        assert x is not None
        old = node.outputs[0]
        if x in self.twins and order == LAST.get(len(order)):
            if old.is_graph_output():
                return
            replace(old, self.twins[x])
        elif order == FIRST.get(len(order)):
            self.twins[old] = x

    def _elementwise(self, node: ir.Node) -> None:
        """Values of one shape, single numbers and one number per channel."""
        old = node.outputs[0]
        shape = dims(old)
        if shape is None or len(shape) not in LAST or not any(map(self._has_twin, node.inputs)):
            return
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and operand_axis(node) is not None:
            return
        if any(reader.op_type == "Conv" for reader in old.consumers()):
            return  # between the two transpositions of an integer convolution
        inputs = [self._along(value, shape, node) for value in node.inputs]
        if any(new is None and old is not None for new, old in zip(inputs, node.inputs, strict=True)):
            return
        self._made(node, self._new(node, inputs))

    def _along(self, value: ir.Value | None, shape: list[Any], node: ir.Node) -> ir.Value | None:
        """The operand of an elementwise node as its twin needs it; None where it cannot be had."""
        if value is None:
            return None
        if value in self.twins:
            return self.twins[value]
        array = array_of(value)
        if array is not None and array.size == 1:
            return value
        if array is not None and array.ndim <= len(shape):
            full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
            return self.editor.constant(full.transpose(LAST[len(shape)]), f"{value.name}.last")
        return self._twin(value, node) if dims(value) == shape else None

    def _new(self, node: ir.Node, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
        """The output of a node like this one, with other inputs."""
        return self.editor.node(
            node.op_type,
            inputs,
            before=node,
            name=node.name or node.op_type,
            attributes=attributes_of(node) | attributes,
        )

    def _framed(self, node: ir.Node) -> None:
        """Put a pooling of codes between two transpositions."""
        x, result = node.inputs[0], node.outputs[0]
        assert x is not None
        if x.dtype not in _INTEGERS or len(result.shape or ()) != 4:
            return
        twin = self._twin(x, node)
        node.replace_input_with(
            0, self.editor.transposed(twin, FIRST[4], before=node, name=f"{node.name}.enter")
        )
        self.twins[result] = self.editor.transposed(result, LAST[4], before=node, name=f"{node.name}.leave")

    def _concat(self, node: ir.Node) -> None:
        shape = dims(node.outputs[0])
        if shape is None or len(shape) != 4 or attribute(node, "axis", 0) % 4 != 1:
            return
        if any(map(self._has_twin, node.inputs)):
            inputs: list[ir.Value | None] = [
                self._twin(value, node) for value in node.inputs if value is not None
            ]
            self._made(node, self._new(node, inputs, axis=3))

    def _reshape(self, node: ir.Node) -> None:
        """(B, D, h, w) to tokens (B, D, L) and back."""
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        before, after = dims(x), dims(old)
        if x not in self.twins or before is None or after is None or {len(before), len(after)} != {3, 4}:
            return
        if before[1] != after[1] or not static((*before[1:], *after[1:])):
            return
        target = self.editor.numbers(-1, *after[2:], after[1])
        twin = self.editor.node("Reshape", [self.twins[x], target], before=node, name=node.name or "reshape")
        self._made(node, twin)

    def _resize(self, node: ir.Node) -> None:
        """Nearest neighbours at a whole factor: rows and columns are repeated."""
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        before, after = dims(x), dims(old)
        if x not in self.twins or before is None or after is None or len(after) != 4:
            return
        if not _repeats(node) or not static((*before[1:], *after[1:])):
            return
        if any(big % small for small, big in zip(before[2:], after[2:], strict=True)):
            return
        (height, width), channels = before[2:], before[1]
        down, along = after[2] // height, after[3] // width
        name = node.name or "resize"
        apart = self.editor.node(
            "Reshape",
            [self.twins[x], self.editor.numbers(-1, height, 1, width, 1, channels)],
            before=node,
            name=f"{name}.apart",
        )
        wide = self.editor.node(
            "Expand",
            [apart, self.editor.numbers(1, 1, down, 1, along, 1)],
            before=node,
            name=f"{name}.repeat",
        )
        target = self.editor.numbers(-1, *after[2:], channels)
        self._made(node, self.editor.node("Reshape", [wide, target], before=node, name=name))

    def _average(self, node: ir.Node) -> None:
        """Averages of cells side by side, without padding."""
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        before, after = dims(x), dims(old)
        window = list(attribute(node, "kernel_shape", ()))
        if x not in self.twins or before is None or after is None or len(after) != 4:
            return
        strides = list(attribute(node, "strides", (1, 1)))
        if strides != window or any(attribute(node, "pads", (0,))) or not static((*before[1:], *after[1:])):
            return
        if [size * factor for size, factor in zip(after[2:], window, strict=True)] != before[2:]:
            return
        name = node.name or "average"
        apart = self.editor.node(
            "Reshape",
            [
                self.twins[x],
                self.editor.numbers(-1, after[2], window[0], after[3], window[1], before[1]),
            ],
            before=node,
            name=f"{name}.apart",
        )
        axes = self.editor.constant(np.array([2, 4], np.int64), "axes")
        twin = self.editor.node("ReduceMean", [apart, axes], before=node, name=name, keepdims=0)
        self._made(node, twin)


def _repeats(resize: ir.Node) -> bool:
    """Whether a Resize by whole factors repeats each cell."""
    places = attribute(resize, "coordinate_transformation_mode", "half_pixel")
    nearest = attribute(resize, "nearest_mode", "round_prefer_floor")
    whole = {"asymmetric": ("floor",), "half_pixel": ("round_prefer_floor", "round_prefer_ceil")}
    return attribute(resize, "mode", "nearest") == "nearest" and nearest in whole.get(places, ())


def operand_axis(node: ir.Node) -> int | None:
    """The dimension that owns the steps of a QuantizeLinear or DequantizeLinear; None for one step."""
    step = array_of(node.inputs[1])
    return None if step is not None and step.size == 1 else int(attribute(node, "axis", 1))
