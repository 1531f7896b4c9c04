"""The pass: from QuantizeLinear and DequantizeLinear anywhere to what ONNX Runtime runs on integers."""

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qdetr_cli.export.ort.bands import sink
from qdetr_cli.export.ort.convolutions import integer_convolutions
from qdetr_cli.export.ort.editor import SIGNED, UNSIGNED, Editor
from qdetr_cli.export.ort.layout import channels_last
from qdetr_cli.export.ort.linears import integer_linears
from qdetr_cli.export.ort.pairs import hoist, merge, remove_unused
from qdetr_cli.export.ort.products import integer_products


def prepared(model: onnx.ModelProto, *, portable: bool = False) -> onnx.ModelProto:
    """The same model in the form that ONNX Runtime runs fastest; a float model comes back as it is.

    `portable`: weights are uint8 with 128 for 0, whose products with uint8 ONNX Runtime adds in 32 bits on
    every processor. Those with int8 it adds two by two in 16 bits where there is no VNNI: see `instructions`.
    """
    read = ir.from_proto(model)
    if not any(node.op_type == "QuantizeLinear" for node in read.graph):
        return model
    editor = Editor(read.graph, UNSIGNED if portable else SIGNED)
    merge(read.graph)
    hoist(editor)
    merge(read.graph)
    integer_linears(editor)
    integer_convolutions(editor)
    integer_products(editor)
    remove_unused(read.graph)
    channels_last(editor)
    remove_unused(read.graph)
    sink(editor)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    ):
        tidy(read)
    return ir.to_proto(read)
