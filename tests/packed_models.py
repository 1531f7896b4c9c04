"""Tiny detectors with weights of every width and kind of quantizer, to be packed, for tests."""

import copy
import tempfile
from functools import cache
from pathlib import Path

import torch
from family_models import facts_of, put_under
from quantized_detectors import calibrated, inputs
from tiny_detectors import tiny_config
from torch import Tensor, nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.models import Model, Source, open_model
from qdetr_cli.recipe import load_recipe

RECIPE = """
schema: 1
extends: w4a4
rules:
  - {role: [backbone, encoder.ffn], weight: {bits: 2, quantizer: statistics}}
  - role: [encoder.attention, backbone.attention]
    op: linear
    weight: {bits: 2, quantizer: lsq, mid_rise: true}
  - {role: decoder.self_attention, op: linear, weight: {bits: 3, quantizer: statistics}}
  - {role: decoder.ffn, weight: {bits: 3, per: tensor}}
  - {role: input_proj, weight: {bits: 5}}
  - {role: class_head, weight: {bits: 8, quantizer: statistics, per: tensor}}
"""


@cache
def recipe_file() -> str:
    """A file with that recipe."""
    path = Path(tempfile.mkdtemp()) / "every_width.yaml"
    path.write_text(RECIPE)
    return str(path)


@cache
def fake_quant(name: str) -> Model:
    """A tiny detector under the recipe, calibrated. Not to be changed."""
    reference, facts = facts_of(name)
    model = copy.deepcopy(reference)
    plan = put_under(name, recipe_file(), model)
    detector = load_config_model(tiny_config(name), None)
    detector.model = calibrated(model, inputs("pixels", 4, (64, 96)))
    recipe = load_recipe(recipe_file())
    return Model(detector=detector, facts=facts, plan=plan, recipe=recipe, metrics={"ap": 0.5})


def opened(folder: Path) -> Model:
    """The model in a folder."""
    return open_model(Source(str(folder)), lambda line: None)


@torch.no_grad()
def outputs(module: nn.Module) -> dict[str, Tensor]:
    """Logits and boxes of noise with padding."""
    found = module.eval()(**inputs("mask", 2, (64, 96)))
    return {"logits": found.logits, "pred_boxes": found.pred_boxes}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit, but for the sign of zeros."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
