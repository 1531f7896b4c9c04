"""The names of layers in files: the path of the module that computes one, what it is, and which call of it.

    model.encoder.layers.0.fc1:linear      model.decoder.layers.0.self_attn:product:1

The exporter's own names number the operations of the graph; with these a profile speaks of modules.
"""

import re
from collections.abc import Callable

import onnx_ir as ir

from qdetr_cli.export.kernels import Kind

SCOPES = "pkg.torch.onnx.name_scopes"  # the modules that a node is in, outermost first, and its own name
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = ("MatMul", "Gemm")
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


def name_layers(graph: ir.Graph, is_constant: Callable[[ir.Node], bool]) -> None:
    """Name each convolution, linear layer and product; `is_constant` tells of nodes that are no views."""
    calls: dict[str, int] = {}
    for node in graph:
        path = _module(node) if node.op_type in (*_CONVOLUTIONS, *_PRODUCTS) else ""
        if path:
            name = f"{path}:{_kind(node, is_constant)}"
            calls[name] = count = calls.get(name, -1) + 1
            node.name = f"{name}:{count}" if count else name
            for bias in _biases(node):
                bias.name = f"{node.name}.bias"


def _biases(node: ir.Node) -> list[ir.Node]:
    """The addition that the exporter made of a linear layer's bias; OpenVINO calls the layer by its name."""
    readers = node.outputs[0].consumers()
    scopes = node.metadata_props.get(SCOPES)
    return [each for each in readers if each.op_type == "Add" and each.metadata_props.get(SCOPES) == scopes]


def _module(node: ir.Node) -> str:
    """The path of the innermost module that a node is in, as the detector has it; "" where none is named."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))
    return str(scopes[-2]).removeprefix("model.") if len(scopes) > 2 else ""


def _kind(node: ir.Node, is_constant: Callable[[ir.Node], bool]) -> Kind:
    if node.op_type in _CONVOLUTIONS:
        return "convolution"
    return "linear" if any(_fixed(each, is_constant) for each in node.inputs[:2]) else "product"


def _fixed(value: ir.Value | None, is_constant: Callable[[ir.Node], bool]) -> bool:
    """Whether a value is a constant, or a view of one."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _VIEWS:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if node is not None:
        return is_constant(node)
    return value is not None and (value.const_value is not None or value.is_initializer())
