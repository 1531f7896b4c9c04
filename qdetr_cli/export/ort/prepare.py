"""The pass: from QuantizeLinear and DequantizeLinear anywhere to what ONNX Runtime runs on integers."""

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qdetr_cli.export.ort.bands import sink
from qdetr_cli.export.ort.convolutions import integer_convolutions
from qdetr_cli.export.ort.editor import Editor
from qdetr_cli.export.ort.layout import channels_last
from qdetr_cli.export.ort.linears import integer_linears
from qdetr_cli.export.ort.pairs import hoist, merge, remove_unused
from qdetr_cli.export.ort.products import integer_products


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in the form that ONNX Runtime runs fastest; a float model comes back as it is."""
    read = ir.from_proto(model)
    if not any(node.op_type == "QuantizeLinear" for node in read.graph):
        return model
    editor = Editor(read.graph)
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
