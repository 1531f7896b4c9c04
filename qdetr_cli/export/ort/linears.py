"""Linear layers in the form that ONNX Runtime runs on integers: see `scaled`."""

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import Array, Editor, attribute, replace
from qdetr_cli.export.ort.pairs import operand
from qdetr_cli.export.ort.scaled import real_product


def integer_linears(editor: Editor) -> None:
    """Bring every product of codes with constant codes into that form."""
    for node in list(editor.graph):
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and _plain(node)):
            _place(editor, node)
    editor.graph.sort()


def _place(editor: Editor, node: ir.Node) -> None:
    x, matrix = operand(node.inputs[0]), _matrix(node)
    if x is None or matrix is None or x.axis is not None:
        return
    codes, step = matrix
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    y = real_product(editor, x, codes, step, bias, before=node, name=node.name or "linear")
    y.shape = node.outputs[0].shape
    replace(node.outputs[0], y)


def _plain(node: ir.Node) -> bool:
    """Whether a Gemm is x * matrix + bias."""
    whole = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    return bool(whole and not attribute(node, "transA", 0))


def _matrix(node: ir.Node) -> tuple[Array, Array] | None:
    """The weights as codes (D_in, D_out) with steps (D_out,); None where they are no constant int8 codes."""
    value, turned = node.inputs[1], bool(attribute(node, "transB", 0))
    made = None if value is None else value.producer()
    if made is not None and made.op_type == "Transpose" and made.inputs[0] is not None:
        value, turned = made.inputs[0], not turned
    weight = operand(value)
    codes = None if weight is None else weight.constant
    if weight is None or codes is None or codes.ndim != 2 or codes.dtype != np.int8 or weight.zero.any():
        return None
    if weight.axis not in (None, 0 if turned else 1):
        return None
    codes = codes.T if turned else codes
    return codes, np.broadcast_to(weight.step, (codes.shape[1],)).astype(np.float32)
