"""Balance of q and k in models: in their graphs, in calibration, in a recipe, in an integer file."""

import copy
from functools import cache

import pytest
import torch
from quantized_detectors import calibrated, float_model, inputs
from torch import nn

from qdetr_cli.attention import QuantAttention
from qdetr_cli.balance import Balance
from qdetr_cli.calibrate import passes
from qdetr_cli.errors import RecipeError
from qdetr_cli.families import family_of
from qdetr_cli.plan import make_plan
from qdetr_cli.rates import parameter_groups
from qdetr_cli.recipe import Train, recipe_from_dict
from qdetr_cli.rewrite import rewrite, set_enabled
from qdetr_cli.trace import GraphFacts, trace

MODELS = ["detr", "conditional_detr", "table-transformer"]
FOUR = {slot: {"bits": 4} for slot in ("q", "k", "probs", "v")}


@cache
def traced(name: str) -> tuple[nn.Module, GraphFacts]:
    model = float_model(name)
    return model, trace(model, family_of(model), (64, 96))


def rewritten(name: str, **q: object) -> nn.Module:
    """The model with 4-bit attention; q has these keys besides. Not calibrated."""
    model, facts = copy.deepcopy(traced(name))
    rule = {"op": "attention", **FOUR, "q": {"bits": 4, **q}}
    rewrite(model, make_plan(recipe_from_dict({"schema": 1, "rules": [rule]}, source="test"), facts), facts)
    return model.eval()


@cache
def balanced(name: str) -> nn.Module:
    """The same with q and k balanced, calibrated. Not to be changed."""
    return calibrated(rewritten(name, balance=True), inputs("pixels")).eval()


@pytest.mark.parametrize("name", MODELS)
def test_with_quantizers_off_it_is_the_float_model(name):
    reference, model = traced(name)[0].eval(), copy.deepcopy(balanced(name))
    found = [each for each in model.modules() if isinstance(each, Balance)]
    assert len(found) == 6, "two layers of encoder and decoder"
    assert sum(bool((each.q.gain - 1).abs().max() > 0.1) for each in found) >= 5
    set_enabled(model, None, False)
    with torch.no_grad():
        for kind in ("pixels", "mask"):
            expected, got = (each(**inputs(kind)).logits for each in (reference, model))
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_balances_after_alignment_and_before_rounding(name):
    model = rewritten(name, balance=True, align=True)
    assert passes(model) == 2
    for attention in model.modules():
        if not isinstance(attention, QuantAttention):
            continue
        for captured in attention.captured.values():
            calls = {str(node.target): node for node in captured.graph.nodes if node.op == "call_module"}
            assert calls["q_quantizer"].args[0].target == "balance.q"
            assert calls["balance.q"].args[0].target == "q_alignment"
            assert calls["k_quantizer"].args[0].target == "balance.k"


def test_k_in_float_is_balanced_all_the_same():
    model, facts = copy.deepcopy(traced("detr"))
    rule = {"op": "attention", **FOUR, "k": "float", "q": {"bits": 4, "balance": True}}
    rewrite(model, make_plan(recipe_from_dict({"schema": 1, "rules": [rule]}, source="test"), facts), facts)
    calibrated(model, inputs("pixels")).eval()
    set_enabled(model, None, False)
    with torch.no_grad():
        got = model(**inputs("pixels")).logits
        torch.testing.assert_close(
            got, traced("detr")[0].eval()(**inputs("pixels")).logits, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_both_sides_and_nothing_decays(name):
    model = copy.deepcopy(balanced(name)).train()
    model(**inputs("pixels")).logits.square().mean().backward()
    own = {name: each for name, each in model.named_parameters() if ".balance." in name}
    assert len(own) == 6 * 3
    moved = [
        name
        for name, each in own.items()
        if name.endswith("gain") and each.grad is not None and bool(each.grad.any())
    ]
    assert len(moved) >= 10
    groups = parameter_groups(model, family_of(model), Train(weight_decay=0.1))
    ids = {id(each) for each in own.values()}
    assert {group["weight_decay"] for group in groups for each in group["params"] if id(each) in ids} == {0.0}


def test_it_exports_and_loads():
    model, again = balanced("conditional_detr"), rewritten("conditional_detr", balance=True)
    again.load_state_dict(model.state_dict())
    given = inputs("pixels", 2, (64, 64))
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(again.eval()(**given).logits, expected)
        program = torch.export.export(copy.deepcopy(model), (), given, strict=False)
        torch.testing.assert_close(program.module()(**given).logits, expected, rtol=0, atol=1e-6)


def test_only_q_says_it():
    for slot in ("k", "v", "probs"):
        rule = {"op": "attention", **FOUR, slot: {"bits": 4, "balance": True}}
        with pytest.raises(RecipeError, match=r"rules\.0\.\w+.*balance: k follows q; say it of q"):
            recipe_from_dict({"schema": 1, "rules": [rule]}, source="mine.yaml")
