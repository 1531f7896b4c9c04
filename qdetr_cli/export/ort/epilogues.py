"""What follows a convolution and can be moved into its weights, its bias and the codes of its result."""

from dataclasses import dataclass
from dataclasses import replace as changed

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.ort.editor import Array, array_of, consumers
from qdetr_cli.export.ort.pairs import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What follows a convolution: clip(y * gain + shift, low, high), numbers all; `end` is the result."""

    gain: Array
    shift: Array
    low: float
    high: float
    end: ir.Value


def epilogue_of(conv: ir.Node) -> Epilogue:
    """What follows until a value is read twice, or by something that is no clip and no affine map."""
    one, zero = np.ones((), np.float32), np.zeros((), np.float32)
    found = Epilogue(gain=one, shift=zero, low=-np.inf, high=np.inf, end=conv.outputs[0])
    while True:
        following = _extended(found)
        if following is None:
            return found
        found = following


def _extended(so_far: Epilogue) -> Epilogue | None:
    """The epilogue with the node that follows; None where it ends."""
    readers = consumers(so_far.end)
    if len(readers) != 1 or so_far.end.is_graph_output():
        return None
    node = readers[0]
    end = node.outputs[0]
    if node.op_type == "Relu":
        return changed(so_far, low=max(so_far.low, 0.0), high=max(so_far.high, 0.0), end=end)
    if node.op_type not in ("Mul", "Add"):
        return None
    other = next((each for each in node.inputs if each is not so_far.end), None)
    values = array_of(other)
    if values is None or values.size != 1:
        return None
    number = np.float32(values.reshape(()))
    if node.op_type == "Add":
        return changed(
            so_far,
            shift=so_far.shift + number,
            low=float(np.float32(so_far.low) + number),
            high=float(np.float32(so_far.high) + number),
            end=end,
        )
    if number <= 0:
        return None
    return changed(
        so_far,
        gain=so_far.gain * number,
        shift=so_far.shift * number,
        low=float(np.float32(so_far.low) * number),
        high=float(np.float32(so_far.high) * number),
        end=end,
    )


def code_of(end: float, grid: Grid) -> float:
    """The code of a real value, not cut."""
    if not np.isfinite(end):
        return end
    return float(np.rint(np.float32(end) / grid.step) + grid.zero.astype(np.float32))
