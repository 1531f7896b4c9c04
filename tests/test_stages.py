"""Stages: which quantizers are on at which part of a training."""

from types import SimpleNamespace

import pytest
from torch import nn

from qdetr_cli.errors import RecipeError
from qdetr_cli.layers import QuantLinear
from qdetr_cli.quantizers import make_quantizer
from qdetr_cli.recipe import QuantFormat, Stage, Train, recipe_from_dict
from qdetr_cli.rewrite import quantizers
from qdetr_cli.stages import Stages

WEIGHT = QuantFormat(bits=4, symmetric=True, unsigned=False, per="tensor", quantizer="lsq", init="mse")
ROLES = {
    "backbone": "backbone",
    "stem": "backbone.stem",
    "ffn": "decoder.ffn",
    "cross": "decoder.cross_attention",
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for slot in ("q", "k", "probs", "v"):
            setattr(self, f"{slot}_quantizer", make_quantizer(WEIGHT, axis=None, channels=1))


def model() -> nn.ModuleDict:
    layers = {name: nn.Linear(4, 4) for name in ("backbone", "stem", "ffn")}
    made = {name: QuantLinear.from_float(each, weight=WEIGHT, input=WEIGHT) for name, each in layers.items()}
    return nn.ModuleDict({**made, "cross": Attention()})


PLAN = SimpleNamespace(modules=[SimpleNamespace(path=path, role=role) for path, role in ROLES.items()])
ALL = {f"{path}.{slot}_quantizer" for path in ("backbone", "stem", "ffn") for slot in ("weight", "input")} | {
    f"cross.{slot}_quantizer" for slot in ("q", "k", "probs", "v")
}


def on(module: nn.Module) -> set[str]:
    return {path for path, quantizer in quantizers(module).items() if quantizer.enabled}


def layers(*paths: str, slots: tuple[str, ...] = ("weight", "input")) -> set[str]:
    return {f"{path}.{slot}_quantizer" for path in paths for slot in slots}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        pytest.param({"roles": ("backbone",)}, layers("backbone", "stem"), id="a role and its children"),
        pytest.param({"roles": ("backbone.stem",)}, layers("stem"), id="a child alone"),
        pytest.param(
            {"roles": ("decoder",)},
            layers("ffn") | layers("cross", slots=("q", "k", "probs", "v")),
            id="a prefix",
        ),
        pytest.param(
            {"slots": ("weight",)}, layers("backbone", "stem", "ffn", slots=("weight",)), id="a slot"
        ),
        pytest.param({"slots": ("q", "v")}, layers("cross", slots=("q", "v")), id="slots of attention"),
        pytest.param(
            {"roles": ("backbone", "decoder.ffn"), "slots": ("input",)},
            layers("backbone", "stem", "ffn", slots=("input",)),
            id="slots of roles",
        ),
        pytest.param({}, ALL, id="everything"),
    ],
)
def test_a_stage_has_on_what_it_names(stage, expected):
    module = model()
    Stages(module, PLAN, [Stage(until=0.5, **stage)]).enter(0.0)
    assert on(module) == expected


def test_stages_follow_one_another_and_in_the_end_all_is_on():
    """Up to and without `until`; the order in which they are entered does not matter."""
    module = model()
    stages = Stages(
        module, PLAN, [Stage(until=0.25, roles=("backbone",)), Stage(until=0.5, slots=("weight",))]
    )
    first = layers("backbone", "stem")
    second = layers("backbone", "stem", "ffn", slots=("weight",))
    for done, expected in (
        (0.0, first),
        (0.2499, first),
        (0.25, second),
        (0.49, second),
        (0.5, ALL),
        (1.0, ALL),
    ):
        stages.enter(done)
        assert on(module) == expected, done
    stages.enter(0.1)
    assert on(module) == first


def test_without_stages_all_is_on_from_the_start():
    module = model()
    module["ffn"].weight_quantizer.enabled = False
    Stages(module, None, []).enter(0.0)
    assert on(module) == ALL


def test_what_is_measured_has_all_on_and_the_stage_goes_on_after_it():
    module = model()
    stages = Stages(module, PLAN, [Stage(until=0.5, roles=("backbone",))])
    stages.enter(0.0)
    before = on(module)
    with stages.all_on():
        assert on(module) == ALL
    assert on(module) == before != ALL
    with pytest.raises(KeyError), stages.all_on():
        raise KeyError
    assert on(module) == before


def test_a_stage_that_selects_nothing_is_refused():
    stages = [Stage(until=0.2, roles=("backbone",)), Stage(until=0.5, roles=("encoder",))]
    with pytest.raises(RecipeError, match=r"train\.stages\.1: selects nothing that this recipe quantizes"):
        Stages(model(), PLAN, stages)
    with pytest.raises(RecipeError, match=r"train\.stages\.0: selects nothing"):
        Stages(nn.Linear(2, 2), PLAN, [Stage(until=0.5)])
    with pytest.raises(RecipeError, match=r"train\.stages\.0: selects nothing"):
        Stages(model(), PLAN, [Stage(until=0.5, roles=("decoder.ffn",), slots=("q",))])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"until": 0.5}, {"until": 0.5}], "train.stages: until must rise from stage to stage"),
        ([{"until": 1.0}], "train.stages.0.until: 1.0 should be less than 1"),
        ([{"until": 0.0}], "train.stages.0.until: 0.0 should be greater than 0"),
        ([{"roles": "backbone"}], "train.stages.0.until: is missing"),
        ([{"until": 0.5, "roles": "neck"}], "train.stages.0.roles: neck is not a role; roles: backbone,"),
        ([{"until": 0.5, "slots": "bias"}], "train.stages.0.slots.0: bias is not one of weight, input, q"),
        ([{"until": 0.5, "role": "backbone"}], "train.stages.0.role: unknown key; did you mean roles?"),
    ],
    ids=["equal", "the whole", "nothing", "no end", "role", "slot", "near miss"],
)
def test_a_recipe_with_faulty_stages_is_refused(stages, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict({"schema": 1, "train": {"stages": stages}}, source="mine.yaml")
    assert message in str(caught.value)


def test_a_recipe_keeps_its_stages():
    stages = [{"until": 0.2, "roles": "backbone"}, {"until": 0.5, "slots": ["weight", "q"]}]
    recipe = recipe_from_dict({"schema": 1, "train": {"stages": stages}}, source="t")
    assert recipe.train.stages == (
        Stage(until=0.2, roles=("backbone",)),
        Stage(until=0.5, slots=("weight", "q")),
    )
    assert recipe_from_dict(recipe.to_dict(), source="qdetr.json") == recipe
    assert Train().stages == ()
