"""Residual sums: found in every backbone that adds, exact while off, rounded where they are made."""

import copy

import pytest
import torch
from quantized_detectors import calibrated, float_model, inputs, run
from torch import Tensor, nn

from qdetr_cli.families import family_of
from qdetr_cli.fold import fold_batch_norms
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import recipe_from_dict
from qdetr_cli.residuals import givers
from qdetr_cli.rewrite import quantizers, rewrite, set_enabled
from qdetr_cli.trace import trace

RULE = {"schema": 1, "rules": [{"role": "backbone.residual", "output": {"bits": 8, "init": "minmax"}}]}
STAGES = "model.backbone.model.encoder.stages"


@pytest.mark.parametrize("name", ["detr", "detr, timm", "rt_detr"])
def test_sums_are_exact_while_off_and_on_their_grids_when_on(name):
    reference = float_model(name, dropout=0.0)
    facts = trace(reference, family_of(reference), (64, 96))
    model = copy.deepcopy(reference)
    rewrite(model, make_plan(recipe_from_dict(RULE, source="test"), facts), facts)
    paths = [f"{each.path}.output_quantizer" for each in facts.residuals]
    assert len(paths) == 8
    assert sorted(paths) == sorted(quantizers(model))
    fold_batch_norms(reference, facts.batch_norms)
    set_enabled(model, None, False)
    given = inputs("mask")
    for key, value in run(model, given, False).items():
        assert torch.equal(value, run(reference, given, False)[key]), key
    set_enabled(model, None, True)
    calibrated(model, given)
    for each in facts.residuals:
        check_on_grid(model, each.path, given)


def check_on_grid(model: nn.Module, path: str, given: dict) -> None:
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, args, result: seen.append(result.detach()))
    with torch.no_grad():
        model(**given)
    handle.remove()
    quantizer = module.output_quantizer
    assert len(seen) == 1
    torch.testing.assert_close(quantizer.dequantize(quantizer.integers(seen[0])), seen[0])
    assert seen[0].unique().numel() > 8


def test_the_shortcut_of_the_block_before_is_not_rounded_twice():
    facts = trace(float_model("rt_detr"), family_of(float_model("rt_detr")), (64, 96))
    own = [each.path for each in facts.residuals if each.path.startswith(f"{STAGES}.0.")]
    assert own == [f"{STAGES}.0.layers.0.shortcut", f"{STAGES}.0.layers.0.activation"]


class Block(nn.Module):
    """A residual block that gives its sum itself, or one activation for two places."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        if self.act is None:
            return self.conv(x) + x
        return self.act(self.act(self.conv(x)) + x)


class Network(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 3, 1), Block(shared), Block(shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.stem(x))).relu()


@pytest.mark.parametrize(
    ("shared", "wanted"),
    [(False, ("stem", "one", "two")), (True, ("stem",))],
    ids=["a block without activation", "an activation that is called twice is left alone"],
)
def test_what_gives_a_sum(shared, wanted):
    program = torch.export.export(Network(shared).eval(), (torch.zeros(1, 3, 4, 4),), strict=False)
    assert givers(program.graph.nodes, owner) == wanted


def owner(node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""
