"""Where activations are rounded: moved to where the compiler does it in passing, and every value stays.

Rounding is monotonous, so it may come before a maximum as well as after it; what only moves values, joining
maps or repeating pixels, may come after it too. Then all of that moves eight bits a value, and a convolution
gives them itself. Two equal grids on one tensor are one: calibration gives a tensor that two layers read one
grid twice.
"""

from typing import Any

import torch

from qdetr_cli.export.openvino_nodes import Roundings, is_stand_in, is_used, name_of, put, readers
from qdetr_cli.export.openvino_sums import mark_sums
from qdetr_cli.export.program import Rounding


def placed(model: Any, roundings: Roundings) -> Roundings:
    """Move the stand-ins of a model; the roundings of those that are there afterwards, by name."""
    _merge(model, roundings)
    after = _early(model, roundings)
    mark_sums(model, after)
    return after


def _stand_ins(output: Any, roundings: Roundings) -> list[Any]:
    """The stand-ins that round an output and are read, by name."""
    first = [each.get_node() for each in output.get_target_inputs() if each.get_index() == 0]
    return sorted((each for each in first if is_stand_in(each, roundings) and is_used(each)), key=name_of)


def _merge(model: Any, roundings: Roundings) -> None:
    """Let the first of several equal roundings of one tensor stand for all, and leave out repeated ones."""
    for node in model.get_ordered_ops():
        for output in node.outputs():
            kept = [node] if is_stand_in(node, roundings) else []
            for each in _stand_ins(output, roundings):
                own = roundings[name_of(each)]
                same = [one for one in kept if _equal(roundings[name_of(one)], own)]
                if same:
                    put(same[0], each.output(0).get_target_inputs())
                else:
                    kept.append(each)


def _equal(first: Rounding, second: Rounding) -> bool:
    """Whether two roundings of one tensor give the same."""
    one, other = first.grid, second.grid
    zeros = [torch.zeros_like(each.step) if each.zero is None else each.zero for each in (one, other)]
    return (
        first.axis == second.axis
        and torch.equal(one.step, other.step)
        and torch.equal(one.qmin - zeros[0], other.qmin - zeros[1])
        and one.qmax - one.qmin == other.qmax - other.qmin
    )


def _early(model: Any, roundings: Roundings) -> Roundings:
    """Round before each operation that `_moves` and whose result is rounded alone; the roundings then."""
    known = dict(roundings)
    for node in reversed(model.get_ordered_ops()):
        moved = _moves(node)
        after = readers(node.output(0)) if moved else []
        key = name_of(after[0]) if len(after) == 1 and is_stand_in(after[0], known) else ""
        if key and known[key].axis is None:
            for side in moved:
                early = _stand_in(node.input_value(side), f"{key}.early{side}")
                node.input(side).replace_source_output(early.output(0))
                known[name_of(early)] = known[key]
            put(node, after[0].output(0).get_target_inputs())
            after[0].set_friendly_name(f"{key}.late")
            node.set_friendly_name(key)
    return known


def _moves(node: Any) -> tuple[int, ...]:
    """The inputs that an operation takes the values of its result from, as they are."""
    kind = node.get_type_name()
    if kind == "MaxPool" or (kind == "Interpolate" and node.get_attributes()["mode"] == "nearest"):
        return (0,)
    return tuple(range(node.get_input_size())) if kind == "Concat" else ()


def _stand_in(x: Any, name: str) -> Any:
    """A node that stands for a quantizer of x until its grid is written."""
    from openvino import opset13 as op

    node = op.fake_quantize(x, 0.0, 1.0, 0.0, 1.0, 2)
    node.set_friendly_name(name)
    return node
