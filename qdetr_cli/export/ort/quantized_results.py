"""Convolutions whose result becomes codes: QLinearConv, or QGemm for cells of many channels."""

from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.bands import band_rows, joined, numbered, split
from qdetr_cli.export.ort.editor import FIRST, LAST, Array, Editor, attribute, attributes_of, dims, replace
from qdetr_cli.export.ort.epilogues import Epilogue, code_of
from qdetr_cli.export.ort.kernels import Kernel, WholeBias, paired_kernel, with_whole_bias
from qdetr_cli.export.ort.pairs import Grid, Operand, Rounding, clipped, dequantized, quantized
from qdetr_cli.export.ort.windows import windows_of

_DEEP = 512  # channels
_GEOMETRY = ("strides", "pads", "dilations", "group", "kernel_shape")


def quantized_result(
    editor: Editor, conv: ir.Node, x: Operand, kernel: Kernel, epilogue: Epilogue, rounding: Rounding
) -> None:
    """Let the codes of `rounding` come from convolutions, or products, with quantized result."""
    gained = Kernel(
        codes=kernel.codes,
        step=(kernel.step * epilogue.gain).astype(np.float32),
        bias=(kernel.bias * epilogue.gain + epilogue.shift).astype(np.float32),
    )
    result = _Result(
        editor=editor,
        conv=conv,
        x=x,
        kernel=with_whole_bias(gained, x),
        name=rounding.name,
        grid=rounding.grid,
    )
    ends = [code_of(end, rounding.grid) for end in (epilogue.low, epilogue.high)]
    low, high = (int(np.clip(end, rounding.grid.low, rounding.grid.high)) for end in ends)
    make = result.product if _deep(conv, kernel) else result.convolution
    bands = [
        clipped(editor, make(band, suffix), low, high, before=conv, name=f"{rounding.name}{suffix}")
        for band, suffix in result.bands()
    ]
    image = joined(editor, bands, before=conv, name=rounding.name)
    replace(rounding.codes, editor.transposed(image, FIRST, before=conv, name=f"{rounding.name}.transpose"))


def _deep(conv: ir.Node, kernel: Kernel) -> bool:
    """Whether a product of matrices is faster than a convolution: cells of many channels, one at a time."""
    windows = windows_of(conv) if attribute(conv, "group", 1) == 1 else None
    return windows is not None and windows.trivial and kernel.codes.shape[1] >= _DEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """A convolution whose result becomes codes of `grid`.

    What gives the codes of a band in their last form has the name of the quantizer, with which `probes` finds
    them where the bands are never joined.
    """

    editor: Editor
    conv: ir.Node
    x: Operand
    kernel: WholeBias
    name: str
    grid: Grid

    def bands(self) -> list[tuple[ir.Value, str]]:
        """The codes with channels last, in bands of rows where each row of the result needs one row."""
        if self.paired is not None:
            return [(self._pairs(self.paired), "")]
        last = self.editor.transposed(self.x.codes, LAST, before=self.conv, name=f"{self.conv.name}.last")
        shape, windows = dims(self.x.codes), windows_of(self.conv)
        if shape is None or windows is None or not windows.trivial:
            return [(last, "")]
        counts = band_rows(shape[2], shape[3] * max(self.kernel.codes.shape[:2]))
        return numbered(split(self.editor, last, counts, before=self.conv, name=self.conv.name or "conv"))

    def convolution(self, codes: ir.Value, suffix: str) -> ir.Value:
        """The codes (B, h, w, D_out) of a convolution, which the runtime fuses with both transpositions."""
        own, editor, conv = f"{self.conv.name}{suffix}", self.editor, self.conv
        weights, geometry = self.kernel.codes, attributes_of(conv, _GEOMETRY)
        if self.paired is not None:
            weights = paired_kernel(weights)
            geometry = {"kernel_shape": list(weights.shape[2:])}
        first = editor.transposed(codes, FIRST, before=conv, name=f"{own}.enter")
        y = editor.node(
            "Conv",
            [self._real(first, own), *self._constants(own, weights, axis=0)],
            before=conv,
            name=own,
            shape=self._shape(codes),
            dtype=ir.DataType.FLOAT,
            attributes=geometry,
        )
        made = quantized(editor, y, self._whole(), before=conv, name=f"{self.name}{suffix}")
        moved = f"{self.name}{suffix}.transpose" if suffix else f"{own}.leave"
        return editor.transposed(made, LAST, before=conv, name=moved)

    def product(self, codes: ir.Value, suffix: str) -> ir.Value:
        """The same of windows of one cell, by a product of matrices."""
        own, editor, conv = f"{self.conv.name}{suffix}", self.editor, self.conv
        matrix = self.kernel.codes[:, :, 0, 0].T
        flat = editor.numbers(-1, matrix.shape[0])
        rows = editor.node("Reshape", [codes, flat], before=conv, name=f"{own}.rows", dtype=codes.dtype)
        inputs = [self._real(rows, own), *self._constants(own, matrix, axis=1)]
        y = editor.node("Gemm", inputs, before=conv, name=own, dtype=ir.DataType.FLOAT, kind="convolution")
        made = quantized(editor, y, self._whole(), before=conv, name=f"{self.name}{suffix}")
        shape = self._shape(codes)
        last = [shape[each] for each in LAST]
        target = editor.numbers(-1, *last[1:])
        moved = f"{self.name}{suffix}.reshape" if suffix else f"{own}.image"
        return editor.node(
            "Reshape", [made, target], before=conv, name=moved, shape=last, dtype=self.grid.kind
        )

    @property
    def paired(self) -> list[int] | None:
        """How the image is padded for `paired_kernel`; None where that does not apply, or does not pay."""
        shape, windows, kernel = dims(self.x.codes), windows_of(self.conv), self.kernel.codes
        plain = attribute(self.conv, "dilations", (1, 1)) + attribute(self.conv, "strides", (1, 1))
        if windows is None or shape is None or list(plain) != [1, 1, 2, 2] or not 1 < kernel.shape[1] <= 4:
            return None
        cells = [
            size + (side + 1) // 2 - 1 for size, side in zip(windows.output, kernel.shape[2:], strict=True)
        ]
        top, left = windows.pads[:2]
        after = [2 * cells[0] - shape[2] - top, 2 * cells[1] - shape[3] - left]
        return (
            [0, 0, top, left, 0, 0, *after]
            if min(after) >= 0 and attribute(self.conv, "group", 1) == 1
            else None
        )

    def _pairs(self, pads: list[int]) -> ir.Value:
        """The codes (B, D, h, w) as squares of four cells, (B, h / 2, w / 2, 4 * D)."""
        editor, conv, name, x = self.editor, self.conv, f"{self.conv.name}.pairs", self.x
        shape, kind = dims(x.codes), x.codes.dtype
        assert shape is not None
        channels = shape[1]
        rows, columns = ((shape[place] + pads[place] + pads[place + 4]) // 2 for place in (2, 3))
        zero = editor.constant(x.zero.reshape(()), f"{conv.name}.padding")
        padded = editor.node(
            "Pad",
            [x.codes, editor.numbers(*pads), zero],
            before=conv,
            name=f"{name}.pad",
            dtype=kind,
            mode="constant",
        )
        last = editor.transposed(padded, LAST, before=conv, name=f"{name}.last")
        apart = editor.node(  # what lies side by side in a row stays so: two transpositions, both quick
            "Reshape",
            [last, editor.numbers(-1, rows, 2, columns, 2 * channels)],
            before=conv,
            name=f"{name}.apart",
            dtype=kind,
        )
        turned = editor.node(
            "Transpose", [apart], before=conv, name=f"{name}.turned", dtype=kind, perm=[0, 1, 3, 2, 4]
        )
        return editor.node(
            "Reshape",
            [turned, editor.numbers(-1, rows, columns, 4 * channels)],
            before=conv,
            name=name,
            shape=[shape[0], rows, columns, 4 * channels],
            dtype=kind,
        )

    def _real(self, codes: ir.Value, name: str) -> ir.Value:
        x = self.x
        return dequantized(self.editor, codes, x.step, x.zero, None, before=self.conv, name=f"{name}.input")

    def _whole(self) -> Grid:
        """The grid with all the codes of its type, which a QuantizeLinear cuts to by itself."""
        info = np.iinfo(self.grid.zero.dtype)
        return changed(self.grid, low=int(info.min), high=int(info.max))

    def _shape(self, codes: ir.Value) -> list[Any]:
        """The shape of the result with channels first, for the rows that `codes` (B, h, w, D) have."""
        output = dims(self.conv.outputs[0]) or [None] * 4
        windows, rows = windows_of(self.conv), dims(codes)
        trivial = windows is not None and windows.trivial
        height = rows[1] if trivial and rows is not None else output[2]
        return [output[0], output[1], height, output[3]]

    def _constants(self, name: str, codes: Array, *, axis: int) -> list[ir.Value]:
        """Weights and bias as they are read; `axis` is that of the output channels in `codes`."""
        kernel, channels = self.kernel, len(self.kernel.step)
        weight, zeros = self.editor.kernel(codes, (channels,), f"{name}.weight")
        bias = self.editor.own(kernel.bias, f"{name}.bias")  # else results with two grids would be one
        wide = np.zeros(channels, np.int32)
        editor, conv = self.editor, self.conv
        return [
            dequantized(editor, weight, kernel.step, zeros, axis, before=conv, name=f"{name}.weight"),
            dequantized(editor, bias, kernel.bias_step, wide, 0, before=conv, name=f"{name}.bias"),
        ]
