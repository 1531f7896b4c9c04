"""Every shipped recipe loads, begins with its header, and plans on tiny detectors of each family."""

import re
from functools import cache

import pytest
from tiny_detectors import tiny_config

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.errors import RecipeError
from qdetr_cli.plan import Plan, make_plan
from qdetr_cli.recipe import (
    FIGURE_2_11,
    Stage,
    Term,
    load_recipe,
    recipe_folder,
    recipe_from_dict,
    recipe_names,
    recipe_summary,
    recipe_text,
    role_matches,
)
from qdetr_cli.terms import check_terms
from qdetr_cli.trace import GraphFacts, trace

PAPER = ("qdetr_w2a2", "qdetr_w3a3", "qdetr_w4a4")
BEST = ("best_w2a2", "best_w3a3", "best_w4a4", "best_w4a4_attn4", "best_w4a4_sums")
NAMES = (*BEST, "fig2_11", "float", *PAPER, "w2a2", "w3a3", "w4a4", "w4a4_attn4", "w8a8")
FRAGMENTS = ("_base", "_best", "_qdetr", "_sums")
BITS = {  # weights, activations, attention
    "best_w2a2": (2, 2, 8),
    "best_w3a3": (3, 3, 8),
    "best_w4a4": (4, 4, 8),
    "best_w4a4_attn4": (4, 4, 4),
    "best_w4a4_sums": (4, 4, 8),
    "fig2_11": (4, 4, 8),
    "qdetr_w2a2": (2, 2, 8),
    "qdetr_w3a3": (3, 3, 8),
    "qdetr_w4a4": (4, 4, 8),
    "w2a2": (2, 2, 8),
    "w3a3": (3, 3, 8),
    "w4a4": (4, 4, 8),
    "w4a4_attn4": (4, 4, 4),
    "w8a8": (8, 8, 8),
}
EIGHT = (
    *("backbone.stem", "input_proj", "class_head", "box_head"),
    *("decoder.cross_attention.position", "decoder.other"),
)
SPARED = ("box_head.last", "sampling", "query")


@cache
def facts(family: str) -> GraphFacts:
    detector = load_config_model(tiny_config(family), None)
    return trace(detector.model, detector.family, (64, 64))


@cache
def plan(name: str, family: str) -> Plan:
    return make_plan(load_recipe(name), facts(family))


families = pytest.mark.parametrize("family", ["detr", "conditional_detr", "rt_detr", "d_fine"])
shipped = pytest.mark.parametrize("name", NAMES)
quantizing = pytest.mark.parametrize("name", sorted(BITS))


def test_the_shelf_holds_what_is_promised() -> None:
    assert recipe_names() == NAMES
    assert {path.stem for path in recipe_folder().iterdir()} == {*NAMES, *FRAGMENTS}


@pytest.mark.parametrize("name", [*NAMES, *FRAGMENTS])
def test_headers_say_purpose_need_command_and_result(name: str) -> None:
    text = (recipe_folder() / f"{name}.yaml").read_text()
    head = r"# \w.+\n# Needs : .+\n# Run   : qdetr .+\n# Result: .+\n(?:#         .+\n)*schema: 1\n"
    assert re.match(head, text)
    assert "not measured" not in text
    assert name in FRAGMENTS or f" {name}" in text.splitlines()[2]
    assert name in FRAGMENTS or recipe_summary(name) == recipe_text(name).splitlines()[0].removeprefix("# ")


@shipped
def test_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(recipe.to_dict(), source="qdetr.json") == recipe


@shipped
@families
def test_shipped_recipes_plan_on_every_family(name: str, family: str) -> None:
    made = plan(name, family)
    assert not [line for line in made.skipped if "has no effect" in line]
    assert Plan.from_dict(made.to_dict()) == made


@pytest.mark.parametrize("family", ["table-transformer", "dab-detr"])
def test_one_recipe_plans_on_the_other_families(family: str) -> None:
    assert not [line for line in plan("w4a4", family).skipped if "has no effect" in line]


@quantizing
@families
def test_eight_bits_take_the_whole_range_but_of_the_memory(name: str, family: str) -> None:
    """Where queries are chosen from it and where it is sampled, which is at 4 bits in some recipes."""
    for module in plan(name, family).modules:
        slots = {slot.slot: slot.format for slot in module.slots}
        if module.op == "deformable":
            assert (slots["v"].symmetric, slots["v"].init) == (False, "mse")
        elif module.op in ("linear", "conv") and not module.is_float:
            eight = name == "w8a8" or any(role_matches(role, module.role) for role in EIGHT)
            memory = module.role == "decoder.other"
            wanted = "percentile" if memory else "minmax" if eight else "mse"
            assert slots["input"].init == wanted, module.path


@quantizing
@families
def test_bits_are_as_the_name_says(name: str, family: str) -> None:
    weights, activations, attention = BITS[name]
    for module in plan(name, family).modules:
        found = {slot.slot: slot.bits for slot in module.slots}
        blocked = module.reason and not module.reason.startswith("kept float")
        if blocked or any(role_matches(role, module.role) for role in SPARED):
            assert set(found.values()) == {32}, module.path
        elif module.op in ("attention", "deformable"):
            assert set(found.values()) == {attention}, module.path
        elif module.op == "residual":
            assert found == {"output": 8}, module.path
        elif any(role_matches(role, module.role) for role in EIGHT):
            assert found == {"weight": 8, "input": 8}, module.path
        else:
            assert found == {"weight": weights, "input": activations}, module.path


@families
def test_formats_are_what_an_integer_matmul_can_use(family: str) -> None:
    """What deformable attention samples is in no such product, so that it may have an offset."""
    seen = {
        (slot.slot, slot.format.per, slot.format.symmetric, slot.format.unsigned)
        for module in plan("w4a4", family).modules
        for slot in module.slots
        if slot.format is not None and (module.op, slot.slot) != ("deformable", "v")
    }
    assert seen == {
        ("weight", "channel", True, False),
        ("input", "tensor", False, False),
        ("q", "head", True, False),
        ("k", "head", True, False),
        ("v", "head", True, False),
        ("probs", "head", True, True),
    }


@families
@pytest.mark.parametrize("name", PAPER)
def test_the_paper_aligns_the_decoders_q_and_changes_no_bits(name: str, family: str) -> None:
    """Deformable cross-attention has no q."""
    made = plan(name, family)
    aligned = {(m.role, s.slot) for m in made.modules for s in m.slots if s.format and s.format.align}
    dense = {m.role for m in made.modules if m.op == "attention"} - {"encoder.attention"}
    assert aligned == {(role, "q") for role in dense}
    assert made.totals() == plan(name.removeprefix("qdetr_"), family).totals()


def test_the_paper_distils_foreground_queries_and_begins_with_the_backbone() -> None:
    recipe = load_recipe("qdetr_w3a3")
    assert recipe.distill.teacher == "float"
    assert recipe.distill.terms == {"foreground_queries": Term(weight=2.5, options={"tau": 0.6})}
    assert recipe.train.stages == (Stage(until=0.5, roles=("backbone",)),)
    check_terms(recipe.distill.terms, "distill.terms")


@families
def test_the_figure_has_four_groups_that_hold_everything_quantized(family: str) -> None:
    made = plan("fig2_11", family)
    assert list(made.ladder) == ["backbone", "encoder", "decoder attention", "MLPs"]
    grouped = [path for paths in made.ladder.values() for path in paths]
    assert sorted(grouped) == sorted(module.path for module in made.modules if not module.is_float)


def test_the_figure_is_also_the_default_ladder() -> None:
    assert load_recipe("fig2_11").ladder == FIGURE_2_11
    assert load_recipe("w4a4").ladder == FIGURE_2_11


@families
def test_float_leaves_everything_alone(family: str) -> None:
    assert all(module.is_float for module in plan("float", family).modules)


@families
def test_fewer_bits_cost_less(family: str) -> None:
    sums = [plan(name, family).totals() for name in ("float", "w8a8", "w4a4", "w3a3", "w2a2")]
    for key in ("bitops", "operations", "bytes"):
        values = [each[key] for each in sums]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == len(values)
    assert plan("w4a4_attn4", family).totals()["bitops"] < plan("w4a4", family).totals()["bitops"]


@families
def test_what_the_family_lacks_is_said(family: str) -> None:
    modules = plan("w4a4", family).modules
    roles, ops = {module.role for module in modules}, {module.op for module in modules}
    absent = {role for role in (*EIGHT, *SPARED) if not any(role_matches(role, found) for found in roles)}
    absent |= {"deformable"} - ops
    said = {line.split(" has no ")[1].split(":")[0] for line in plan("w4a4", family).skipped}
    assert said == absent
    assert ("sampling" in absent) == (family in ("detr", "conditional_detr"))


@families
@pytest.mark.parametrize("slot", ["probs", "v"])
def test_attention_is_planned_in_encoder_and_decoder(family: str, slot: str) -> None:
    quantized = {m.role for m in plan("w4a4", family).modules if m.format(slot) is not None}
    assert quantized == {"encoder.attention", "decoder.self_attention", "decoder.cross_attention"}


def test_the_base_alone_gives_no_bits() -> None:
    with pytest.raises(RecipeError, match=r"no rule gives bits here") as caught:
        make_plan(load_recipe(str(recipe_folder() / "_base.yaml")), facts("detr"))
    assert "rules.0.weight" in str(caught.value)
