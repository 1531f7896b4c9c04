"""The teacher that a student gets: what it says is what the float model says, in less time."""

import pytest
import torch
from quantized_detectors import float_model
from test_family_training import scenes
from torch import nn

from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.models import Model
from qdetr_cli.student import quick
from qdetr_cli.trace import trace


def teacher(name: str) -> Model:
    module = float_model(name, dropout=0.0)
    detector: Detector = load_config_model(module.config.to_dict(), None)
    detector.model.load_state_dict(module.state_dict())
    detector.model.eval()
    return Model(detector=detector)


def outputs(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = module(pixel_values=pixels.contiguous(memory_format=torch.channels_last))
    return found.logits, found.pred_boxes


def batch_norms(module: nn.Module) -> list[str]:
    return [path for path, each in module.named_modules() if "BatchNorm" in type(each).__name__]


@pytest.mark.parametrize("known", [True, False], ids=["facts known", "facts traced"])
@pytest.mark.parametrize("name", ["conditional_detr", "rt_detr"])
def test_a_quick_teacher_says_the_same(name, known):
    model = teacher(name)
    before = outputs(model.module)
    assert batch_norms(model.module)
    facts = trace(model.module, model.family, (64, 96)) if known else None
    module = quick(model, facts)
    assert not batch_norms(module)
    for mine, theirs in zip(outputs(module), before, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    convolutions = [each for each in module.modules() if isinstance(each, nn.Conv2d)]
    assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in convolutions)


def test_a_batch_is_given_with_channels_last_and_the_same_pixels():
    batch = scenes()
    moved = batch.to("cpu")
    assert moved.pixel_values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.pixel_values, batch.pixel_values)
