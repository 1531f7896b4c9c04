"""The integer reference: codes of the grid bit for bit, and products of whole numbers."""

from dataclasses import replace

import pytest
import torch
from exported_models import SIZE, images, toy
from torch import fx

from qdetr_cli.export.layers import model_values
from qdetr_cli.export.program import exported
from qdetr_cli.export.reference import Settled, settled
from qdetr_cli.operators import FAKE_QUANTIZE
from qdetr_cli.rewrite import set_enabled

PRODUCTS = 8  # six layers, and two products of attention


@pytest.mark.parametrize(
    ("bits", "mid_rise"), [(2, False), (2, True), (4, False), (8, False)], ids=lambda value: str(value)
)
def test_it_gives_every_quantizer_the_codes_of_the_fake_quant_model(bits, mid_rise):
    model, given = toy(bits, mid_rise=mid_rise), images(1, seed=6)  # others may lie between two codes
    found = settled(exported(model, SIZE), given)
    wanted, _ = model_values(model, given)
    for path, value in wanted.items():
        assert torch.equal(found.values[path], value), path
    with torch.no_grad():
        outputs = model(**given)
    torch.testing.assert_close(found.logits, outputs.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.pred_boxes, outputs.pred_boxes, rtol=1e-6, atol=1e-6)
    assert (found.integer_products, found.real_products) == (PRODUCTS, 0)


def test_a_layer_with_a_real_operand_is_counted_as_real():
    model = toy(4)
    set_enabled(model, ["tokens"], False)
    found = settled(exported(model, SIZE), images(1))
    assert (found.integer_products, found.real_products) == (PRODUCTS - 1, 1)


def test_sums_are_exact_where_float32_sums_are_not():
    """300 terms of 255 * 127: beyond 2^24 float32 loses the units, and the reference must not."""
    x = torch.full((1, 1031), 255.0)
    x[0, -1] = 1
    weight = torch.full((1, 1031), 127.0)
    weight[0, -1] = 1
    graph = fx.Graph()
    given, stored, one = (graph.placeholder(name) for name in ("pixel_values", "weight", "one"))
    codes = [
        graph.call_function(FAKE_QUANTIZE, (each, one, None, 0, 255, None, name))
        for each, name in ((given, "x"), (stored, "w"))
    ]
    y = graph.call_function(torch.ops.aten.linear.default, tuple(codes))
    graph.output((y, y))
    found = _run(fx.GraphModule({}, graph), x, weight, torch.ones(1))
    exact = 1030 * 255 * 127 + 1
    assert found.item() == float(torch.tensor(float(exact), dtype=torch.float64).float())


def _run(module: fx.GraphModule, *given: torch.Tensor) -> torch.Tensor:
    from qdetr_cli.export.reference import _Machine

    return _Machine(module).run(*given)[0]


def _changed(program, path: str, argument: int, change) -> Settled:
    """What the reference says of a program with one wrong quantizer."""
    for node in program.exported.graph.nodes:
        if node.target is FAKE_QUANTIZE and node.args[6] == path:
            node.update_arg(argument, change(node.args[argument]))
    return settled(program, images(1))


@pytest.mark.parametrize(
    ("argument", "change"), [(3, lambda low: low + 2), (4, lambda high: high - 2)], ids=["qmin", "qmax"]
)
def test_a_wrong_grid_shows_in_the_layer_it_belongs_to(argument, change):
    model = toy(4)
    program = exported(model, SIZE)
    wanted, _ = model_values(model, images(1))
    found = _changed(program, "tokens.input_quantizer", argument, change)
    differs = [path for path, value in wanted.items() if not torch.equal(found.values[path], value)]
    assert differs[0] == "tokens.input_quantizer"


def test_a_program_keeps_its_codes_apart_from_those_of_the_model():
    program = exported(toy(4), SIZE)
    rounding = program.roundings["tokens.weight_quantizer"]
    codes = rounding.grid.integers(rounding.constant, rounding.axis)
    finer = replace(rounding.grid, step=rounding.grid.step / 2).integers(rounding.constant, rounding.axis)
    assert codes.abs().max() <= 8
    assert not torch.equal(codes, finer)
