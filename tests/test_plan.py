"""Plans: which rule wins where, what is refused, what is counted."""

import json
from pathlib import Path

import pytest
from tiny_detectors import CONFIGS, tiny_config
from torch import nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.errors import RecipeError
from qdetr_cli.plan import ModulePlan, Plan, make_plan, published_share
from qdetr_cli.recipe import Recipe, load_recipe, recipe_from_dict
from qdetr_cli.trace import AttentionFacts, GraphFacts, LayerFacts, trace


def layer(path: str, role: str, op: str = "linear", **other) -> LayerFacts:
    facts = {
        "aliases": (),
        "calls": 1,
        "macs": 1000,
        "weights": 80,
        "input_shape": (1, 10),
        "output_shape": (1, 8),
        "weight_shape": (8, 10),
        "weight_bypassed": False,
    }
    return LayerFacts(path=path, role=role, op=op, **{**facts, **other})


def attention(path: str, role: str, op: str = "attention") -> AttentionFacts:
    return AttentionFacts(path=path, aliases=(), op=op, role=role, heads=2, head_dim=4, macs=600)


def facts(*others: LayerFacts, deformable: bool = False) -> GraphFacts:
    cross = attention(
        "decoder.0.cross", "decoder.cross_attention", "deformable" if deformable else "attention"
    )
    return GraphFacts(
        family="detr",
        size=(64, 64),
        layers=(
            layer("backbone.stem", "backbone.stem", "conv"),
            layer("backbone.1", "backbone", "conv"),
            layer("encoder.0.q", "encoder.attention"),
            layer("encoder.0.fc1", "encoder.ffn"),
            layer("decoder.0.fc1", "decoder.ffn"),
            layer("head", "class_head", aliases=("decoder.head",)),
            *others,
        ),
        attentions=(attention("encoder.0", "encoder.attention"), cross),
        batch_norms=(),
        uncalled=(),
    )


def recipe(*rules: dict, **sections) -> Recipe:
    return recipe_from_dict({"schema": 1, "rules": list(rules), **sections}, source="mine.yaml")


def plan(*rules: dict, others: tuple[LayerFacts, ...] = (), **sections) -> Plan:
    return make_plan(recipe(*rules, **sections), facts(*others))


def module(made: Plan, path: str) -> ModulePlan:
    return next(each for each in made.modules if each.path == path)


def bits(made: Plan, path: str) -> dict[str, int]:
    return {slot.slot: slot.bits for slot in module(made, path).slots}


def faults(*rules: dict, others: tuple[LayerFacts, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        plan(*rules, others=others)
    return str(caught.value)


IDLE = "(mine.yaml) has no effect: what it selects stays float, or later rules decide"
W4A4 = {"op": ["linear", "conv"], "weight": {"bits": 4}, "input": {"bits": 4}}
LISTED = {
    "op": ["attention", "deformable"],
    "q": {"bits": 8},
    "k": {"bits": 8},
    "probs": {"bits": 8},
    "v": {"bits": 8},
}


def test_every_module_is_in_the_plan_with_all_its_slots() -> None:
    made = plan(W4A4)
    assert [each.path for each in made.modules] == [
        "backbone.stem",
        "backbone.1",
        "encoder.0.q",
        "encoder.0.fc1",
        "decoder.0.fc1",
        "head",
        "encoder.0",
        "decoder.0.cross",
    ]
    assert bits(made, "head") == {"weight": 4, "input": 4}
    assert bits(made, "encoder.0") == {"q": 32, "k": 32, "probs": 32, "v": 32}
    assert module(made, "encoder.0").is_float
    assert module(made, "encoder.0").reason == "no rule"


def test_later_rules_win_by_slot_and_by_field() -> None:
    made = plan(
        {**W4A4, "weight": {"bits": 4, "per": "tensor", "init": "minmax"}},
        {"role": "class_head", "weight": {"bits": 8}},
        {"path": "head", "weight": {"init": {"name": "percentile", "percent": 99.0}}},
    )
    head = module(made, "head").format("weight")
    assert head is not None
    assert (head.bits, head.per, head.init, dict(head.init_options)) == (
        8,
        "tensor",
        "percentile",
        {"percent": 99.0},
    )
    assert bits(made, "head")["input"] == 4
    assert [slot.rule for slot in module(made, "head").slots] == [
        "rules.1 (mine.yaml)",
        "rules.0 (mine.yaml)",
    ]
    other = module(made, "decoder.0.fc1").format("weight")
    assert other is not None
    assert (other.bits, other.init) == (4, "minmax")


@pytest.mark.parametrize(
    ("selector", "paths"),
    [
        pytest.param(
            {"role": "encoder"}, {"encoder.0.q", "encoder.0.fc1", "encoder.0"}, id="role and children"
        ),
        pytest.param({"role": ["backbone.stem", "class_head"]}, {"backbone.stem", "head"}, id="roles or-ed"),
        pytest.param({"path": "*.fc?"}, {"encoder.0.fc1", "decoder.0.fc1"}, id="pattern"),
        pytest.param({"path": "decoder.head"}, {"head"}, id="alias"),
        pytest.param({"op": "conv"}, {"backbone.stem", "backbone.1"}, id="op"),
        pytest.param({"role": "encoder", "op": "linear"}, {"encoder.0.q", "encoder.0.fc1"}, id="and-ed"),
        pytest.param({"role": "encoder", "path": "*q", "op": "linear"}, {"encoder.0.q"}, id="three"),
    ],
)
def test_selectors(selector: dict, paths: set[str]) -> None:
    made = plan(W4A4, LISTED, {**selector, "keep": "float"})
    assert {each.path for each in made.modules if each.is_float} == paths


def test_keep_float_wins_over_earlier_and_yields_to_later_rules() -> None:
    made = plan(W4A4, {"role": "backbone", "keep": "float"}, {"role": "backbone.stem", "input": {"bits": 8}})
    assert module(made, "backbone.1").reason == "kept float by rules.1 (mine.yaml)"
    assert bits(made, "backbone.stem") == {"weight": 32, "input": 8}
    assert module(made, "backbone.stem").reason == ""


def test_float_bits_are_a_slot_of_keep() -> None:
    made = plan(W4A4, {"op": "linear", "input": {"bits": "float"}})
    assert bits(made, "head") == {"weight": 4, "input": 32}
    assert module(made, "head").slots[1].rule == "rules.1 (mine.yaml)"


def test_a_format_after_keep_without_bits_stays_float_and_is_said() -> None:
    made = plan(W4A4, {"op": "conv", "keep": "float"}, {"op": "conv", "weight": {"per": "tensor"}})
    assert module(made, "backbone.1").is_float
    assert made.skipped == (f"rules.2 {IDLE}",)


def test_missing_roles_are_skipped_and_said() -> None:
    made = plan(
        W4A4,
        {"role": ["sampling", "class_head"], "keep": "float"},
        {"role": "sampling", "weight": {"bits": 8}},
    )
    assert made.skipped == ("detr has no sampling: skipped in rules.1 (mine.yaml), rules.2 (mine.yaml)",)
    assert module(made, "head").is_float


def test_missing_operations_are_skipped_and_said_unless_another_of_the_rule_is_there() -> None:
    made = plan(
        W4A4,
        {"op": "deformable", "v": {"bits": 8}},
        {"role": "class_head", "op": ["deformable", "residual"], "keep": "float"},
        {"op": ["deformable", "attention"], "v": {"bits": 8}},
    )
    assert made.skipped == (
        "detr has no deformable: skipped in rules.1 (mine.yaml), rules.2 (mine.yaml)",
        "detr has no residual: skipped in rules.2 (mine.yaml)",
    )
    assert bits(made, "head") == {"weight": 4, "input": 4}


def test_a_rule_without_effect_is_said() -> None:
    made = plan({"role": "class_head", "weight": {"bits": 8}}, W4A4)
    assert made.skipped == (f"rules.0 {IDLE}",)
    assert plan({"role": "class_head", "weight": {"bits": 8, "per": "tensor"}}, W4A4).skipped == ()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        pytest.param(
            {"path": "encoder.0.fc2", "keep": "float"},
            "mine.yaml: rules.0.path: encoder.0.fc2 matches no layer or attention of this model; "
            "did you mean encoder.0.fc1?",
            id="path",
        ),
        pytest.param(
            {"path": ["head", "x*y"], "keep": "float"}, "x*y matches no layer", id="one of two paths"
        ),
        pytest.param(
            {"role": "class_head", "q": {"bits": 8}},
            "rules.0.q: no module that it selects has this slot; linear: input, weight",
            id="slot",
        ),
        pytest.param(
            {"role": "encoder.ffn", "op": "conv", "weight": {"bits": 8}},
            "rules.0: selects no module: its selectors match, but none together",
            id="nothing together",
        ),
        pytest.param(
            {"op": "conv", "weight": {"per": "tensor"}},
            "rules.0.weight: no rule gives bits here; add bits: 2 to 8, or float",
            id="no bits",
        ),
        pytest.param(
            {"op": "conv", "weight": {"bits": 4, "quantizer": "lsqq"}},
            "rules.0.weight.quantizer: lsqq is not a registered quantizer; did you mean lsq?; registered: ",
            id="quantizer",
        ),
        pytest.param(
            {"op": "conv", "weight": {"bits": 4, "init": "maximum"}},
            "rules.0.weight.init: maximum is not a registered range; ",
            id="range",
        ),
        pytest.param(
            {"op": "conv", "weight": {"bits": 4, "init": {"name": "percentile", "part": 3}}},
            "rules.0.weight.init: percentile has no option part; options: percent",
            id="range option",
        ),
        pytest.param(
            {"op": "conv", "weight": {"bits": 4, "init": {"name": "percentile", "percent": 3}}},
            "rules.0.weight.init: ",
            id="range option value",
        ),
        pytest.param(
            {"op": "conv", "weight": {"bits": 4, "quantizer": {"name": "lsq", "part": 3}}},
            "rules.0.weight.quantizer: ",
            id="quantizer option",
        ),
        pytest.param(
            {"op": "conv", "weight": {"bits": 8, "mid_rise": True}},
            "give 7 bits or fewer, or mid_rise: false",
            id="mid-rise at 8 bits",
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(rule: dict, message: str) -> None:
    assert message in faults(rule)


def test_plan_faults_come_all_at_once() -> None:
    lines = faults(
        {"path": "nothing", "keep": "float"}, W4A4, {"role": "class_head", "v": {"bits": 8}}
    ).splitlines()
    assert lines[0] == "2 faults in this plan:"
    assert [line.split(": ")[1] for line in lines[1:]] == ["rules.0.path", "rules.2.v"]


def test_an_operation_that_is_absent_is_fine_beside_one_that_is_there() -> None:
    dense = make_plan(recipe(W4A4, LISTED), facts())
    sampled = make_plan(recipe(W4A4, LISTED), facts(deformable=True))
    assert bits(dense, "decoder.0.cross") == {"q": 8, "k": 8, "probs": 8, "v": 8}
    assert bits(sampled, "decoder.0.cross") == {"probs": 8, "v": 8}


BYPASSED = layer("packed.out", "decoder.ffn", weight_bypassed=True)
UNCALLED = layer("spare", "decoder.ffn", calls=0)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        pytest.param(BYPASSED, "another module reads its weight without calling it", id="bypassed"),
        pytest.param(UNCALLED, "no forward pass calls it", id="uncalled"),
    ],
)
def test_layers_that_must_stay_float(other: LayerFacts, why: str) -> None:
    made = plan(W4A4, {"path": "*", "op": "linear", "weight": {"bits": 8}}, others=(other,))
    assert module(made, other.path).is_float
    assert module(made, other.path).reason == why
    assert f"{other.path} must stay float: {why}" in faults(
        W4A4, {"path": other.path, "weight": {"bits": 8}}, others=(other,)
    )
    assert module(plan(W4A4, {"path": other.path, "keep": "float"}, others=(other,)), other.path).is_float


def test_ladder_groups_hold_quantized_modules_once() -> None:
    made = plan(
        W4A4,
        {"role": "class_head", "keep": "float"},
        ladder={
            "stem": "backbone.stem",
            "backbone": "backbone",
            "heads": "class_head",
            "rest": ["encoder", "decoder"],
        },
    )
    assert made.ladder == {
        "stem": ("backbone.stem",),
        "backbone": ("backbone.1",),
        "rest": ("encoder.0.q", "encoder.0.fc1", "decoder.0.fc1"),
    }


def test_a_plan_survives_json() -> None:
    made = plan(W4A4, LISTED, {"role": ["class_head", "query"], "keep": "float"})
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_totals_by_hand() -> None:
    made = plan(
        {"op": "conv", "weight": {"bits": 4}, "input": {"bits": 8}},
        {
            "role": "encoder.attention",
            "op": "attention",
            "q": {"bits": 8},
            "k": {"bits": 4},
            "v": {"bits": 2},
        },
    )
    sums = made.totals(parameters=6 * 80 + 25)
    assert sums["macs"] == 6 * 1000 + 2 * 600
    assert sums["quantized_macs"] == 2 * 1000 + 300
    assert sums["bitops"] == 2 * 1000 * 4 * 8 + 4 * 1000 * 1024 + 300 * 8 * 4 + 300 * 32 * 2 + 600 * 1024
    assert sums["float_bitops"] == 7200 * 1024
    assert sums["operations"] == 2 * 1000 / 4 + 4 * 1000 + 300 / 4 + 300 + 600
    assert sums["bytes"] == 2 * (80 * 4 // 8 + 8 * 4) + 4 * 80 * 4 + 25 * 4
    assert sums["float_bytes"] == 4 * (6 * 80 + 25)


def test_deformable_products_are_probs_times_values() -> None:
    made = make_plan(
        recipe({"op": "deformable", "probs": {"bits": 8}, "v": {"bits": 4}}), facts(deformable=True)
    )
    assert module(made, "decoder.0.cross").products == ((600, 8, 4),)


@pytest.mark.parametrize(("bits", "share"), [(2, 1 / 32), (3, 1 / 16), (4, 1 / 8), (8, 1 / 4), (32, 1)])
def test_published_rule(bits: int, share: float) -> None:
    assert published_share(bits) == share


def test_three_bit_weights_are_packed_and_odd_ends_round_up() -> None:
    made = make_plan(
        recipe({"op": "conv", "weight": {"bits": 3, "per": "tensor"}}),
        facts(layer("odd", "backbone", "conv", weights=81)),
    )
    assert module(made, "odd").weight_bytes == 31 + 4  # 243 bits


def test_costs_name_their_units() -> None:
    rows = plan(W4A4).costs()
    assert rows[0][0] == "MACs with both sides quantized"
    assert rows[0][1:] == ("0 %", "83.3 %")
    assert rows[3][0] == "size of the weights of Linear and Conv"
    assert plan(W4A4).costs(parameters=1000)[3] == ("size of the model", "4 kB", "2.51 kB")


def test_messages_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.yaml"
    path.write_text(
        "schema: 1\nrules:\n  - {op: linear, weight: {bits: 4}}\n  - path: heed\n    keep: float\n"
    )
    with pytest.raises(RecipeError, match=r"^lines\.yaml:4: rules\.1\.path: heed matches no layer"):
        make_plan(load_recipe(str(path)), facts())


def test_no_rules_no_bits() -> None:
    made = plan()
    assert all(each.is_float and each.reason == "no rule" for each in made.modules)
    assert made.ladder == {}
    assert made.totals()["bitops"] == made.totals()["float_bitops"]


def test_keep_float_forgets_what_earlier_rules_said() -> None:
    made = plan(
        {"op": "conv", "weight": {"bits": 4, "per": "tensor", "init": "minmax"}},
        {"op": "conv", "keep": "float"},
        {"op": "conv", "weight": {"bits": 8}},
    )
    stated = module(made, "backbone.1").format("weight")
    assert stated is not None
    assert (stated.bits, stated.per, stated.init) == (8, "channel", "mse")


# --- every layer of every family ---


def weighted(model: nn.Module) -> set[frozenset[str]]:
    """All Linear and Conv of a model, each as the set of its names; tied copies are one."""
    names: dict[tuple[int, int], set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            names.setdefault((id(module.weight), id(module.bias)), set()).add(path)
    return {frozenset(each) for each in names.values()}


@pytest.mark.parametrize("name", [name for name in CONFIGS if "timm" not in name], ids=str)
def test_every_layer_of_a_family_has_a_format_or_a_reason(name: str) -> None:
    detector = load_config_model(tiny_config(name), None)
    model = detector.model
    facts = trace(model, detector.family, (64, 96))
    plan = make_plan(load_recipe("w4a4"), facts)
    layers = [module for module in plan.modules if module.op in ("linear", "conv")]
    assert {frozenset((module.path, *module.aliases)) for module in layers} == weighted(model)
    assert len(layers) == len(weighted(model))
    assert all(bool(module.reason) == module.is_float for module in layers)
    own = {id(p): p.numel() for module in model.modules() for p in module.parameters(recurse=False)}
    sums = plan.totals(parameters=sum(own.values()))
    assert sums["float_bytes"] == 4 * sum(own.values())
    assert sums["bytes"] < sums["float_bytes"]
