"""Convolutions whose result stays real: products of matrices, of gathered windows of codes."""

from collections.abc import Iterator
from dataclasses import replace as changed

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.bands import band_rows, joined, numbered, split
from qdetr_cli.export.ort.editor import FIRST, LAST, Editor, dims, replace
from qdetr_cli.export.ort.kernels import Kernel
from qdetr_cli.export.ort.pairs import Operand
from qdetr_cli.export.ort.scaled import real_product
from qdetr_cli.export.ort.windows import Windows, windows_of


def real_result(editor: Editor, conv: ir.Node, x: Operand, kernel: Kernel) -> None:
    """Replace a convolution by products of matrices with real result, one for each band of rows."""
    windows, name = windows_of(conv), conv.name or "conv"
    assert windows is not None
    last = editor.transposed(x.codes, LAST, before=conv, name=f"{name}.last")
    matrix = kernel.codes.transpose(2, 3, 1, 0).reshape(-1, kernel.codes.shape[0])
    bias = editor.constant(kernel.bias, f"{name}.bias") if kernel.bias.any() else None
    bands = [
        real_product(
            editor,
            changed(x, codes=rows),
            matrix,
            kernel.step,
            bias,
            before=conv,
            name=f"{name}{suffix}",
            kind="convolution",
        )
        for rows, suffix in _bands(editor, conv, x, windows, last)
    ]
    image = joined(editor, bands, before=conv, name=name)
    replace(conv.outputs[0], editor.transposed(image, FIRST, before=conv, name=f"{name}.first"))


def _bands(
    editor: Editor, conv: ir.Node, x: Operand, windows: Windows, last: ir.Value
) -> Iterator[tuple[ir.Value, str]]:
    """The codes (B, rows, w_out, depth) that each band of the result needs, and how it is called."""
    name = conv.name or "conv"
    output, channels = dims(conv.outputs[0]), dims(x.codes)
    assert output is not None
    assert channels is not None
    counts = band_rows(output[2], output[3] * output[1])
    depth = windows.places.shape[1] * channels[1]
    if windows.trivial:
        yield from numbered(split(editor, last, counts, before=conv, name=name))
        return
    cells = _cells(editor, conv, x, windows, last)
    begins = np.cumsum([0, *counts])
    for begin, (count, suffix) in zip(begins, numbered(counts), strict=False):
        width = windows.output[1]
        places = windows.places[begin * width : (begin + count) * width]
        gathered = editor.node(
            "Gather",
            [cells, editor.constant(places, f"{name}{suffix}.windows")],
            before=conv,
            name=f"{name}{suffix}.gather",
            dtype=x.codes.dtype,
            axis=1,
        )
        rows = editor.node(
            "Reshape",
            [gathered, editor.numbers(-1, count, width, depth)],
            before=conv,
            name=f"{name}{suffix}.rows",
            shape=[output[0], count, width, depth],
            dtype=x.codes.dtype,
        )
        yield rows, suffix


def _cells(editor: Editor, conv: ir.Node, x: Operand, windows: Windows, last: ir.Value) -> ir.Value:
    """The codes (B, h, w, D), padded, as cells (B, h * w, D)."""
    name, channels = conv.name or "conv", dims(x.codes)
    assert channels is not None
    if any(windows.pads):
        top, left, bottom, right = windows.pads
        pads = editor.numbers(0, top, left, 0, 0, bottom, right, 0)
        zero = editor.constant(x.zero.reshape(()), f"{name}.padding")
        last = editor.node(
            "Pad", [last, pads, zero], before=conv, name=f"{name}.pad", dtype=x.codes.dtype, mode="constant"
        )
    target = editor.numbers(0, -1, channels[1])
    return editor.node("Reshape", [last, target], before=conv, name=f"{name}.cells", dtype=x.codes.dtype)
