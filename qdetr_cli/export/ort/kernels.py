"""The weights of a convolution, and the forms in which integer kernels have them."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import Array, array_of
from qdetr_cli.export.ort.pairs import Operand, operand

_ROOM = 64  # 255 * 64 * 2 < 2**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Integer weights (D_out, D_in / groups, h, w), their steps and the bias in real values, (D_out,)."""

    codes: Array
    step: Array
    bias: Array


def kernel_of(conv: ir.Node) -> Kernel | None:
    """The weights of a convolution; None where they are no integers, or not constant."""
    weight = operand(conv.inputs[1])
    codes = None if weight is None else weight.constant
    bias = array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if weight is None or codes is None or codes.dtype != np.int8 or weight.zero.any():
        return None
    if weight.axis not in (None, 0) or (len(conv.inputs) > 2 and conv.inputs[2] is not None and bias is None):
        return None
    channels = codes.shape[0]
    step = np.broadcast_to(weight.step, (channels,))
    bias = np.zeros(channels, np.float32) if bias is None else bias
    return Kernel(codes=codes, step=step.astype(np.float32), bias=bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeBias:
    """A kernel whose bias is whole multiples of `bias_step`, the step of its products, (D_out,)."""

    codes: Array
    step: Array
    bias: Array  # int32
    bias_step: Array


def with_whole_bias(kernel: Kernel, x: Operand) -> WholeBias:
    """The kernel with each channel's codes times the whole number that loses least of its bias.

    Codes of few bits leave room for such a factor; the step is divided by it. They stay small enough that two
    products, which machines without VNNI add in 16 bits, cannot saturate (unless they could to begin with).
    """
    codes = kernel.codes.astype(np.int32)
    largest = np.abs(codes).reshape(len(codes), -1).max(1).clip(1)
    most = np.maximum(_ROOM // largest, 1)  # (D_out,)
    factors = np.arange(1, most.max() + 1)[:, None]
    fine = (kernel.step * x.step).astype(np.float64) / factors  # (factors, D_out)
    lost = np.abs(np.rint(kernel.bias / fine) * fine - kernel.bias) + np.where(factors > most, np.inf, 0.0)
    factor = factors[lost.argmin(0), 0]
    step = (kernel.step / factor).astype(np.float32)
    products = (step * x.step.reshape(())).astype(np.float32)
    whole = np.rint(kernel.bias.astype(np.float64) / products).clip(-(2**31), 2**31 - 1)
    shaped = factor.reshape(-1, 1, 1, 1)
    return WholeBias(
        codes=(codes * shaped).astype(np.int8), step=step, bias=whole.astype(np.int32), bias_step=products
    )


def paired_kernel(codes: Array) -> Array:
    """Weights (D_out, D, h, w) of stride 2 for images whose squares of four cells are one, with stride 1.

    The first convolution of a detector sees 3 channels, fewer than a kernel can hold side by side: this way
    it sees 12, and takes 0.6 of the time (7x7, 640x640).
    """
    outputs, channels, height, width = codes.shape
    padded = np.pad(codes, ((0, 0), (0, 0), (0, height % 2), (0, width % 2)))
    high, wide = padded.shape[2] // 2, padded.shape[3] // 2
    apart = padded.reshape(outputs, channels, high, 2, wide, 2).transpose(0, 3, 5, 1, 2, 4)
    return apart.reshape(outputs, 4 * channels, high, wide)
