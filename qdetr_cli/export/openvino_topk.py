"""The k greatest of many scores, of equal ones the first, as in ONNX: it decides which tokens become queries.

OpenVINO's stable TopK goes through all scores k times: for 8400 scores and 300 queries that takes longer than
any other layer of an RT-DETR. So its quick TopK, which chooses any of equals, only finds the k-th score: what
is above it is taken, and of what equals it the first few. Those k alone are then sorted by the stable one.
"""

from typing import Any

import numpy as np

FEW = 1 << 16  # scores times k up to which the stable TopK is quick


def keep_order_of_equals(model: Any) -> None:
    """Let each TopK of a model give the first of equal scores first."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "TopK":
            for old, new in zip(node.outputs(), _stable(node), strict=True):
                for target in list(old.get_target_inputs()):
                    target.replace_source_output(new)


def _stable(node: Any) -> tuple[Any, Any]:
    """The values and indices of a stable TopK."""
    from openvino import opset13 as op

    told, scores = node.get_attributes(), node.input_value(0)
    shape, kind = scores.get_partial_shape(), told["index_element_type"]
    taken = node.get_output_partial_shape(0)[told["axis"]]
    many = shape.rank.get_length() == 2 and told["axis"] == 1 and told["mode"] == "max"
    if many and shape[1].is_static and taken.is_static:
        count, k = shape[1].get_length(), taken.get_length()
        if k < count and count * k > FEW:
            return _in_two_steps(scores, count, k, kind)
    made = op.topk(*node.input_values(), told["axis"], told["mode"], told["sort"], kind, True)
    return made.output(0), made.output(1)


def _in_two_steps(scores: Any, count: int, k: int, kind: str) -> tuple[Any, Any]:
    """Of scores (B, count) the values and indices (B, k), the greatest first."""
    from openvino import opset13 as op

    chosen = _indices(scores, count, k)
    values = op.gather_elements(scores, chosen, 1)
    ranked = op.topk(values, _int(k), 1, "max", "value", "i32", True)
    indices = op.gather_elements(chosen, ranked.output(1), 1)
    return ranked.output(0), op.convert(indices, kind).output(0)


def _indices(scores: Any, count: int, k: int) -> Any:
    """Which k of the scores (B, count) are taken: their numbers (B, k), the lowest first."""
    from openvino import opset13 as op

    last = _int([1])
    quick = op.topk(scores, _int(k), 1, "max", "value", "i32")
    least = op.reduce_min(quick.output(0), last, True)
    above, equal = op.greater(scores, least), op.equal(scores, least)
    free = op.subtract(_int(k), op.reduce_sum(op.convert(above, "i32"), last, True))
    first = op.less_equal(op.cum_sum(op.convert(equal, "i32"), _int(1)), free)
    taken = op.logical_or(above, op.logical_and(equal, first))
    place = op.subtract(op.cum_sum(op.convert(taken, "i32"), _int(1)), _int(1))
    place = op.select(taken, place, _int(k))  # what is not taken goes behind the others
    batch = op.slice(op.shape_of(scores, "i32"), _int([0]), _int([1]), _int([1]))
    empty = op.broadcast(_int(0), op.concat([batch, _int([k + 1])], 0))
    numbers = op.broadcast(_int(np.arange(count)[None]), op.shape_of(scores, "i32"))
    filled = op.scatter_elements_update(empty, place, numbers, _int(1))
    return op.slice(filled, _int([0]), _int([k]), _int([1]), _int([1]))


def _int(value: Any) -> Any:
    from openvino import opset13 as op

    return op.constant(np.asarray(value, np.int32))
