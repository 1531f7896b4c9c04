"""Residual sums that OpenVINO's compiler adds inside the convolution that makes one side of them.

It does so where a FakeQuantize stands between convolution and sum, as tools that round both sides leave it.
Ours rounds the shortcut and the sum, not the convolution: so between them is put a FakeQuantize of 2^24
levels, no coarser than float32, over a range beyond which the sum is at an end of its grid in any case.
"""

from typing import Any

from qdetr_cli.export.openvino_grids import number, numbers
from qdetr_cli.export.openvino_nodes import Roundings, name_of, readers
from qdetr_cli.export.program import Rounding

LEVELS = 1 << 24
SPARE = 1.0 + 2.0**-10  # so that the ends themselves round as all else does


def mark_sums(model: Any, roundings: Roundings) -> None:
    """Put such a FakeQuantize behind each convolution that is added to a rounded value for a rounded sum."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Add":
            for side in (0, 1):
                limit = _limit(node, side, roundings)
                if limit is not None and _is_convolution(node.input_value(side)):
                    _mark(node, side, limit)
                    break


def _mark(node: Any, side: int, limit: float) -> None:
    from openvino import opset13 as op

    ends = [number(-limit), number(limit)]
    marked = op.fake_quantize(node.input_value(side), *ends, *ends, LEVELS)
    marked.set_friendly_name(f"{name_of(node)}.convolution")
    node.input(side).replace_source_output(marked.output(0))


def _limit(node: Any, side: int, roundings: Roundings) -> float | None:
    """The magnitude of one side beyond which the rounded sum is at an end; None where nothing rounds it."""
    after = readers(node.output(0))
    rectified = len(after) == 1 and after[0].get_type_name() == "Relu"
    after = readers(after[0].output(0)) if rectified else after
    added = _rounding(node.input_value(1 - side).get_node(), roundings)
    result = _rounding(after[0], roundings) if len(after) == 1 else None
    if added is None or result is None:
        return None
    (lowest, highest), (low, high) = _ends(added), _ends(result)
    return SPARE * max(abs((0.0 if rectified else low) - highest), abs(high - lowest))


def _rounding(node: Any, roundings: Roundings) -> Rounding | None:
    """What a node rounds to, be it the stand-in of a quantizer, or a max pool that has come behind it."""
    known = node.get_type_name() in ("FakeQuantize", "MaxPool")
    return roundings.get(name_of(node)) if known else None


def _ends(rounding: Rounding) -> tuple[float, float]:
    """The least and the greatest number of a grid."""
    grid = numbers(rounding, 4)
    return float((grid.low * grid.step).min()), float((grid.high * grid.step).max())


def _is_convolution(output: Any) -> bool:
    """Whether an output that is read once is a convolution, with or without a bias."""
    node = output.get_node()
    if len(output.get_target_inputs()) != 1:
        return False
    if node.get_type_name() == "Add" and node.input_value(1).get_node().get_type_name() == "Constant":
        return _is_convolution(node.input_value(0))
    return node.get_type_name() in ("Convolution", "GroupConvolution")
