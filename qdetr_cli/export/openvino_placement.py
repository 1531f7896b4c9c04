"""Where activations are rounded: moved to where the compiler does it in passing, and every value stays.

Rounding is monotonous, so it may come before a maximum as well as after it; then what is pooled has eight
bits. Two equal grids on one tensor are one: calibration gives a tensor that two layers read one grid twice.
"""

from typing import Any

import torch

from qdetr_cli.export.openvino_nodes import Roundings, is_stand_in, is_used, name_of, put, readers
from qdetr_cli.export.openvino_sums import mark_sums
from qdetr_cli.export.program import Rounding


def placed(model: Any, roundings: Roundings) -> Roundings:
    """Move the stand-ins of a model; the roundings of those that are there afterwards, by name."""
    _merge(model, roundings)
    after = {**roundings, **_before_pooling(model, roundings)}
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


def _before_pooling(model: Any, roundings: Roundings) -> Roundings:
    """Round before each max pool whose result is rounded alone; the roundings of the new stand-ins."""
    made: Roundings = {}
    for pool in model.get_ordered_ops():
        if pool.get_type_name() != "MaxPool":
            continue
        after = readers(pool.output(0))
        key = name_of(after[0]) if len(after) == 1 and is_stand_in(after[0], roundings) else ""
        if key and roundings[key].axis is None:
            early = _stand_in(pool.input_value(0), f"{key}.early")
            pool.input(0).replace_source_output(early.output(0))
            put(pool, after[0].output(0).get_target_inputs())
            after[0].set_friendly_name(f"{key}.late")
            pool.set_friendly_name(key)
            made[name_of(early)] = roundings[key]
    return made


def _stand_in(x: Any, name: str) -> Any:
    """A node that stands for a quantizer of x until its grid is written."""
    from openvino import opset13 as op

    node = op.fake_quantize(x, 0.0, 1.0, 0.0, 1.0, 2)
    node.set_friendly_name(name)
    return node
