"""Convolutions in the forms that ONNX Runtime runs on integers.

What reads the result decides. (Ratios to the float kernel, 256 channels at 40x40, one core with AVX512-VNNI
and AMX.)

- Only quantizers read it: a convolution with quantized result (0.26), or a product with quantized result for
  windows of one cell and many channels. A ReLU and an affine map with positive gain that stand between move
  into codes, bias and steps. Quantizers with different grids cost a convolution each.
- Something reads real values, such as a sum with a shortcut: a product of matrices with real result (1x1:
  0.21); larger kernels gather their windows of codes first (3x3: 0.23). ConvInteger, which ONNX has for this,
  takes 5.5 times as long as float.
- Grouped convolutions of the second kind stay float.

Biases of the first kind are int32 at the step of the products, as these kernels have them; those of the
second are real.
"""

import onnx_ir as ir

from qdetr_cli.export.ort.editor import Editor, attribute
from qdetr_cli.export.ort.epilogues import epilogue_of
from qdetr_cli.export.ort.kernels import Kernel, kernel_of
from qdetr_cli.export.ort.pairs import operand, roundings_of
from qdetr_cli.export.ort.quantized_results import quantized_result
from qdetr_cli.export.ort.real_results import real_result
from qdetr_cli.export.ort.windows import windows_of


def integer_convolutions(editor: Editor) -> None:
    """Bring every convolution of codes with constant weights into the form that its readers need."""
    for node in list(editor.graph):
        if node.op_type == "Conv":
            _place(editor, node)
    editor.graph.sort()


def _place(editor: Editor, conv: ir.Node) -> None:
    x, kernel = operand(conv.inputs[0]), kernel_of(conv)
    if x is None or kernel is None or x.axis is not None:
        return
    epilogue = epilogue_of(conv)
    roundings = [each for each in roundings_of(epilogue.end) if each.grid.axis is None]
    dense = attribute(conv, "group", 1) == 1 and windows_of(conv) is not None
    if roundings and (len(roundings) == 1 or not dense or _narrow(kernel)):
        for rounding in roundings:
            quantized_result(editor, conv, x, kernel, epilogue, rounding)
    elif dense:
        real_result(editor, conv, x, kernel)


def _narrow(kernel: Kernel) -> bool:
    """Whether windows cost more to gather than the convolution itself does: large kernels on few channels."""
    return bool(kernel.codes.shape[1] < 32 and kernel.codes[0, 0].size > 1)
