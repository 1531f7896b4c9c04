"""A program as an ONNX model: quantizers become pairs of QuantizeLinear and DequantizeLinear.

Activations are uint8 and weights int8 integers, whatever their width: fewer bits keep their grid by a Clip of
the integers between the pair. Codes are q - qmin for activations, and q itself for weights.
"""

from collections.abc import Callable
from itertools import chain, count
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qdetr_cli.export.layer_names import name_layers
from qdetr_cli.export.program import OUTPUTS, Program, Rounding, exported
from qdetr_cli.models import Model
from qdetr_cli.operators import FAKE_QUANTIZE

OPSET = 21
DOMAIN, MARK = "qdetr", "FakeQuantize"


def onnx_model(
    model: Model, size: tuple[int, int], *, batch: int | None = 1, mask: bool = True
) -> onnx.ModelProto:
    """The ONNX model of a float or fake-quant model for images of `size` (H, W), `batch` of them (None: any).

    Inputs are pixel_values (B, 3, H, W) and, where the family uses it and `mask` asks for it, pixel_mask
    (B, H, W) int64.
    """
    return with_pairs(marked(exported(model.module, size, mask=mask, batch=batch)))


def marked(program: Program) -> "Marked":
    """The graph of the program, in which quantizers are nodes `qdetr.FakeQuantize` that bear their key.

    Layers are named after their modules: see `layer_names`.
    """
    made = torch.onnx.export(
        program.exported,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=list(program.inputs),
        output_names=list(OUTPUTS),
        custom_translation_table={FAKE_QUANTIZE: _mark()},
    )
    assert made is not None
    _adopt_constants(made.model.graph)
    graph = Marked(made.model, program)
    stored = {node for node, _, rounding in graph.quantizers() if rounding.constant is not None}
    name_layers(graph.model.graph, stored.__contains__)
    return graph


def _adopt_constants(graph: ir.Graph) -> None:
    """Register the constants that the exporter's optimizer makes and forgets to."""
    for node in graph:
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() or value.is_initializer():
                continue
            value.name = _free_name(graph, str(value.name))
            graph.register_initializer(value)


def _free_name(graph: ir.Graph, name: str) -> str:
    """The name, or as near to it as no initializer has."""
    names = chain([name], (f"{name}.{number}" for number in count(1)))
    return next(each for each in names if each not in graph.initializers)


class Marked:
    """A graph whose quantizers are still nodes, and the program that it was made from."""

    def __init__(self, model: ir.Model, program: Program) -> None:
        self.model = model
        self.program = program

    def quantizers(self) -> list[tuple[ir.Node, str, Rounding]]:
        """The nodes that stand for quantizers, with key and rounding."""
        found = []
        for node in self.model.graph:
            if node.domain == DOMAIN:
                key = node.attributes["path"].as_string()
                found.append((node, key, self.program.roundings[key]))
        return found


def with_pairs(graph: Marked) -> onnx.ModelProto:
    """The graph with a pair of QuantizeLinear and DequantizeLinear for each quantizer of an activation.

    A constant is stored as integers that a DequantizeLinear reads. The graph that is given is used up.
    """
    for node, key, rounding in graph.quantizers():
        pair = (_pair if rounding.constant is None else _stored)(node, key, rounding)
        value = pair[-1].outputs[0]
        value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
        graph.model.graph.insert_before(node, pair)
        node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
        graph.model.graph.remove(node, safe=True)
    graph.model.opset_imports.pop(DOMAIN, None)
    _tidy(graph.model)
    return ir.to_proto(graph.model)


def _tidy(model: ir.Model) -> None:
    """Leave out what nothing reads any more."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)


def _pair(node: ir.Node, key: str, rounding: Rounding) -> list[ir.Node]:
    grid, axis = rounding.grid, rounding.axis
    lowest = grid.qmin
    graph = node.graph
    zero = torch.zeros_like(grid.step) if grid.zero is None else grid.zero
    scale = _constant(graph, f"{key}.scale", _per(grid.step, axis))
    point = _constant(graph, f"{key}.zero_point", _per(zero - lowest, axis).astype(np.uint8))
    attributes = {} if axis is None else {"axis": axis % _rank(node.inputs[0])}
    quantize = ir.node("QuantizeLinear", [node.inputs[0], scale, point], attributes, name=f"{key}.quantize")
    nodes = [quantize]
    if grid.qmax - grid.qmin < 255:
        low = _constant(graph, f"{key}.low", np.array(0, np.uint8))
        high = _constant(graph, f"{key}.high", np.array(grid.qmax - lowest, np.uint8))
        nodes.append(ir.node("Clip", [quantize.outputs[0], low, high], name=f"{key}.clip"))
    for each in nodes:
        _describe(each, ir.TensorType(ir.DataType.UINT8), node)
    if axis is not None:
        return nodes + _dequantized_by_axis(node, key, rounding, nodes[-1].outputs[0])
    inputs = [nodes[-1].outputs[0], scale, point]
    return [*nodes, ir.node("DequantizeLinear", inputs, attributes, name=f"{key}.dequantize")]


def _dequantized_by_axis(node: ir.Node, key: str, rounding: Rounding, codes: ir.Value) -> list[ir.Node]:
    """In plain arithmetic: ONNX Runtime would fuse a pair with steps per head to a product that it lacks."""
    grid, axis = rounding.grid, rounding.axis
    assert axis is not None
    shape = [1] * _rank(node.inputs[0])
    shape[axis] = -1
    zero = torch.zeros_like(grid.step) if grid.zero is None else grid.zero
    points = _constant(node.graph, f"{key}.zeros", (zero - grid.qmin).reshape(shape).cpu().numpy())
    steps = _constant(node.graph, f"{key}.steps", grid.step.reshape(shape).cpu().numpy())
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT}, name=f"{key}.cast")
    moved = ir.node("Sub", [cast.outputs[0], points], name=f"{key}.subtract")
    scaled = ir.node("Mul", [moved.outputs[0], steps], name=f"{key}.multiply")
    for each in (cast, moved):
        _describe(each, node.outputs[0].type, node)
    return [cast, moved, scaled]


def _describe(made: ir.Node, kind: ir.TypeProtocol | None, like: ir.Node) -> None:
    """Give what a new node makes a type, and the shape of what another makes."""
    made.outputs[0].type, made.outputs[0].shape = kind, like.outputs[0].shape


def _stored(node: ir.Node, key: str, rounding: Rounding) -> list[ir.Node]:
    grid, axis = rounding.grid, rounding.axis
    assert rounding.constant is not None
    signed = grid.qmin < 0
    kind = np.int8 if signed else np.uint8
    codes = grid.integers(rounding.constant, axis).numpy().astype(kind)
    graph = node.graph
    inputs = [
        _constant(graph, f"{key}.codes", codes),
        _constant(graph, f"{key}.scale", _per(grid.step, axis)),
    ]
    if grid.zero is not None:
        inputs.append(_constant(graph, f"{key}.zero_point", _per(grid.zero, axis).astype(kind)))
    attributes = {} if axis is None else {"axis": axis % codes.ndim}
    return [ir.node("DequantizeLinear", inputs, attributes, name=f"{key}.dequantize")]


def _per(values: torch.Tensor, axis: int | None) -> NDArray[Any]:
    array: NDArray[Any] = values.detach().cpu().numpy()
    return array.reshape(()) if axis is None else array


def _rank(value: ir.Value | None) -> int:
    assert value is not None
    assert value.shape is not None
    return len(value.shape)


def _constant(graph: Any, name: str, array: NDArray[Any]) -> ir.Value:
    """An initializer of the graph; one of this name that is there already is the same."""
    if name in graph.initializers:
        return graph.initializers[name]  # type: ignore[no-any-return]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _mark() -> Callable[..., Any]:
    """How the exporter writes a quantizer: a node that has the value and the key, and no grid."""
    from onnx.defs import OpSchema
    from onnxscript import values

    schema = OpSchema(
        MARK,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("x", "T")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(double)"], "")],
        attributes=[OpSchema.Attribute("path", OpSchema.AttrType.STRING)],
    )
    mark = values.Op(values.Opset(DOMAIN, 1), MARK, schema)

    def fake_quantize(x: Any, step: Any, zero: Any, qmin: int, qmax: int, axis: int | None, path: str) -> Any:
        return mark(x, path=path)

    return fake_quantize
