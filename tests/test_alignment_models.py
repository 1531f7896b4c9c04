"""Distribution alignment in models: in their graphs, their plans and their calibration."""

import copy
import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from quantized_detectors import calibrated, float_model, inputs
from torch import nn
from torch.nn import functional as F

from qdetr_cli.alignment import DistributionAlignment
from qdetr_cli.attention import QuantAttention
from qdetr_cli.calibrate import calibrate, passes
from qdetr_cli.families import family_of
from qdetr_cli.plan import Plan, make_plan
from qdetr_cli.rates import parameter_groups
from qdetr_cli.recipe import Calibrate, Train, recipe_from_dict
from qdetr_cli.rewrite import quantizers, rewrite, set_enabled
from qdetr_cli.trace import PRODUCTS, GraphFacts, trace

ROLES = ["decoder.self_attention", "decoder.cross_attention"]
MODELS = ["detr", "conditional_detr", "table-transformer"]
SLOTS = {slot: {"bits": 8} for slot in ("q", "k", "probs", "v")}


def align_rule(**slots: dict) -> dict:
    return {"role": ROLES, "op": "attention", **slots}


@cache
def traced(name: str) -> tuple[nn.Module, GraphFacts]:
    model = float_model(name)
    return model, trace(model, family_of(model), (64, 96))


def planned(name: str, *rules: dict) -> tuple[nn.Module, Plan, GraphFacts]:
    model, facts = copy.deepcopy(traced(name))
    where = {} if name == "detr" else {"role": "decoder"}  # each kind of graph takes a second
    recipe = {"schema": 1, "rules": [{"op": "attention", **where, **SLOTS}, *rules]}
    return model, make_plan(recipe_from_dict(recipe, source="test"), facts), facts


@cache
def aligned(name: str) -> tuple[nn.Module, nn.Module, Plan]:
    """The float model, and the model with quantized attention, q aligned in the decoder; not calibrated."""
    model, plan, facts = planned(name, align_rule(q={"align": True}))
    reference = copy.deepcopy(model)
    rewrite(model, plan, facts)
    return reference, model, plan


def dense(model: nn.Module) -> dict[str, QuantAttention]:
    return {path: each for path, each in model.named_modules() if isinstance(each, QuantAttention)}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_aligns_q_of_both_decoder_attentions_before_it_is_quantized(name):
    _, model, _ = aligned(name)
    attentions = dense(model)
    decoder = {path for path in attentions if ".decoder." in path}
    assert len(decoder) == 4, "two layers of two"
    assert len(attentions) == (6 if name == "detr" else 4), "and two encoder layers"
    for path, attention in attentions.items():
        children = [n for n, each in attention.named_children() if isinstance(each, DistributionAlignment)]
        assert children == (["q_alignment"] if path in decoder else [])
        for captured in attention.captured.values():
            nodes = [node for node in captured.graph.nodes if node.op == "call_module"]
            called = [str(node.target) for node in nodes]
            assert called.count("q_alignment") == (1 if path in decoder else 0)
            assert not any("_alignment" in each and each != "q_alignment" for each in called)
            if path in decoder:
                (quantizer,) = [node for node in nodes if node.target == "q_quantizer"]
                assert quantizer.args[0].target == "q_alignment"
                product = next(iter(users_of(quantizer)))
                assert product.target in PRODUCTS


def users_of(node):
    """What reads a node, past reshapes."""
    for user in node.users:
        if user.target in PRODUCTS:
            yield user
        yield from users_of(user)


@pytest.mark.parametrize("name", MODELS)
def test_an_aligned_model_is_the_float_model_until_it_is_fitted(name):
    reference, model, _ = aligned(name)
    model = copy.deepcopy(model).eval()
    set_enabled(model, None, False)
    for kind in ("pixels", "mask"):
        expected, got = (each(**inputs(kind)).logits for each in (reference, model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def alignments(model: nn.Module) -> dict[str, DistributionAlignment]:
    return {path: m for path, m in model.named_modules() if isinstance(m, DistributionAlignment)}


@cache
def fitted_model(name: str) -> nn.Module:
    model = copy.deepcopy(aligned(name)[1]).eval()
    set_enabled(model, None, False)
    for each in alignments(model).values():
        each.start_observing()
    with torch.no_grad():
        model(**inputs("pixels"))
    assert all(each.finish_observing() for each in alignments(model).values())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_fitted_model_is_nearer_to_the_float_model_than_with_the_bare_norm(name):
    reference, model = aligned(name)[0], fitted_model(name)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for each in alignments(bare).values():
            each.gamma.fill_(1.0)
            each.beta.zero_()
        expected, got, naive = (m(**inputs("pixels")).logits for m in (reference, model, bare))
    error, other = (float((each - expected).square().mean()) for each in (got, naive))
    assert 0 < error < other
    assert error < 0.5 * float(expected.var())


@pytest.mark.parametrize("name", MODELS)
def test_what_reaches_the_product_is_the_normed_projection(name):
    """One decoder attention, by hand: q_alignment's input is (B, N, L, d), and its output by layer norm."""
    model, seen = fitted_model(name), {}
    path, attention = next((p, a) for p, a in alignments(model).items() if ".0." in p)
    handle = attention.register_forward_hook(lambda m, given, y: seen.update(x=given[0], y=y))
    with torch.no_grad():
        model(**inputs("mask"))
    handle.remove()
    heads, width = attention.gamma.shape
    assert seen["x"].shape == (3, heads, 7, width)
    for head in range(heads):
        gain, shift = attention.gamma[head], attention.beta[head]
        expected = F.layer_norm(seen["x"][:, head], (width,), gain, shift, eps=1e-5)
        torch.testing.assert_close(seen["y"][:, head], expected, rtol=1e-4, atol=1e-5)
    assert path == attention.path


def test_both_operands_can_be_aligned():
    apart = {"role": ["encoder", "decoder.self_attention"], "op": "attention", "keep": "float"}
    model, plan, facts = planned("detr", align_rule(q={"align": True}, k={"align": True}), apart)
    rewrite(model, plan, facts)
    set_enabled(model, None, False)
    found = alignments(model)
    assert {path.rpartition(".")[2] for path in found} == {"q_alignment", "k_alignment"}
    for each in found.values():
        each.start_observing()
    with torch.no_grad():
        model.eval()(**inputs("pixels"))
        assert all(each.finish_observing() for each in found.values())
        assert bool(model(**inputs("mask", 2, (64, 64))).logits.isfinite().all())


def test_an_aligned_model_exports_and_loads():
    model = copy.deepcopy(fitted_model("conditional_detr"))
    set_enabled(model, None, True)
    calibrated(model, inputs("pixels")).eval()
    again = copy.deepcopy(aligned("conditional_detr")[1])
    set_enabled(again, None, True)
    again.load_state_dict(model.state_dict())
    given = inputs("pixels", 2, (64, 64))
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(again.eval()(**given).logits, expected)
        program = torch.export.export(model, (), given, strict=False)
        torch.testing.assert_close(program.module()(**given).logits, expected, rtol=0, atol=1e-6)


def test_gains_and_shifts_do_not_decay():
    model = aligned("detr")[1]
    own = {id(p): n for n, p in model.named_parameters() if "_alignment." in n}
    assert len(own) == 8
    groups = parameter_groups(model, family_of(model), Train(weight_decay=0.1))
    decays = {group["weight_decay"] for group in groups for p in group["params"] if id(p) in own}
    assert decays == {0.0}


def test_a_plan_and_a_recipe_keep_it():
    plan = aligned("detr")[2]
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    on = {
        (module.role, slot.slot)
        for module in again.modules
        for slot in module.slots
        if slot.format is not None and slot.format.align
    }
    assert on == {(role, "q") for role in ROLES}
    recipe = recipe_from_dict({"schema": 1, "rules": [align_rule(q={"bits": 8, "align": True})]}, source="t")
    again = recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), source="qdetr.json")
    assert again.rules[0].q is not None
    assert again.rules[0].q.align is True
    assert again == recipe


def test_a_later_rule_can_take_it_back():
    _, plan, _ = planned("detr", align_rule(q={"align": True}), align_rule(q={"align": False}))
    formats = [slot.format for module in plan.modules for slot in module.slots if slot.format]
    assert formats
    assert not any(format.align for format in formats)


def test_calibration_fits_it_first_behind_no_rounding(monkeypatch):
    """The first pass sees the float model's q, the second places the grid on what alignment makes of it."""
    model = copy.deepcopy(aligned("detr")[1])
    set_enabled(model, None, True)
    assert passes(model) == 2
    given, seen, told = inputs("pixels"), [], []
    batch = SimpleNamespace(**given, pixel_mask=None, image_ids=[0, 1, 2])
    batch.to = lambda device: batch
    monkeypatch.setattr("qdetr_cli.calibrate.same_size_batches", lambda *rest: iter([batch]))
    path, first = next(iter(alignments(model).items()))
    first.register_forward_pre_hook(lambda module, args: seen.append((module._sums is None, args[0])))
    silent = calibrate(model, [0, 1, 2], Calibrate(images=3), device=torch.device("cpu"), advance=told.append)
    assert silent == ()
    assert told == [3, 3]
    assert [ready for ready, _ in seen] == [False, True]
    attention = model.get_submodule(path.rpartition(".")[0])
    assert torch.equal(fit_of(first, seen[0][1]).gamma, first.gamma), "fitted on the first pass"
    expected = copy.deepcopy(attention.q_quantizer)
    expected.start_observing()
    expected(first(seen[1][1]).detach())
    expected.finish_observing()
    assert torch.equal(attention.q_quantizer.step, expected.step), "the range lies behind the alignment"
    assert all(quantizer.enabled for quantizer in quantizers(model).values())
    assert all(bool(quantizer.calibrated) for quantizer in quantizers(model).values())


def fit_of(made: DistributionAlignment, x: torch.Tensor) -> DistributionAlignment:
    twin = DistributionAlignment(*made.gamma.shape, axis=made.axis)
    twin.start_observing()
    twin(x)
    twin.finish_observing()
    return twin


def test_an_alignment_that_saw_nothing_is_named(monkeypatch):
    model = copy.deepcopy(aligned("detr")[1])
    model.add_module("nobody", DistributionAlignment(2, 4, axis=-1))
    given = inputs("pixels", 1)
    batch = SimpleNamespace(**given, pixel_mask=None, image_ids=[0])
    batch.to = lambda device: batch
    monkeypatch.setattr("qdetr_cli.calibrate.same_size_batches", lambda *rest: iter([batch]))
    assert calibrate(model, [0], Calibrate(images=1), device=torch.device("cpu")) == ("nobody",)
