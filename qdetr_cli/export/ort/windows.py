"""The windows of a convolution: which cells of a padded image each of its results reads."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import Array, attribute, dims, present, static


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Where the windows of a convolution lie in a padded image: sizes, and the places that each reads."""

    padded: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right
    output: tuple[int, int]
    places: Array  # int32 (h_out * w_out, h * w), numbers of the cells of the padded image

    @property
    def trivial(self) -> bool:
        """Whether each window is one cell, and each cell one window."""
        cells = self.padded[0] * self.padded[1]
        return self.places.shape == (cells, 1)


def windows_of(conv: ir.Node) -> Windows | None:
    """The windows of a convolution of images whose size is known; None for others."""
    shape, kernel = dims(present(conv.inputs[0])), dims(present(conv.inputs[1]))
    if shape is None or kernel is None or len(shape) != 4 or not static((*shape[1:], *kernel)):
        return None
    if attribute(conv, "auto_pad", "NOTSET") != "NOTSET":
        return None
    top, left, bottom, right = attribute(conv, "pads", (0, 0, 0, 0))
    steps, gaps = attribute(conv, "strides", (1, 1)), attribute(conv, "dilations", (1, 1))
    padded = (shape[2] + top + bottom, shape[3] + left + right)
    output = tuple(
        (size - gap * (width - 1) - 1) // step + 1
        for size, gap, width, step in zip(padded, gaps, kernel[2:], steps, strict=True)
    )
    rows, columns = (
        np.add.outer(np.arange(count) * step, np.arange(width) * gap)
        for count, step, width, gap in zip(output, steps, kernel[2:], gaps, strict=True)
    )
    places = rows[:, None, :, None] * padded[1] + columns[None, :, None, :]  # (h_out, w_out, h, w)
    return Windows(
        padded=padded,
        pads=(top, left, bottom, right),
        output=(output[0], output[1]),
        places=places.reshape(output[0] * output[1], -1).astype(np.int32),
    )
