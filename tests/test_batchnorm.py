"""Frozen and live batch norms of a backbone: the same predictions, names and structure, there and back."""

import copy

import pytest
import torch
from tiny_detectors import CONFIGS, TIMM, tiny_config
from torch import nn

from qdetr_cli.batchnorm import freeze_batch_norms, thaw_batch_norms
from qdetr_cli.checkpoint import Detector, load_config_model

WITHOUT_BATCH_NORM = ("yolos", "lw_detr", "rf_detr", "deimv2-vit")  # vision transformers


@pytest.fixture(params=[name for name in CONFIGS if name not in WITHOUT_BATCH_NORM], ids=str)
def detector(request):
    torch.manual_seed(0)
    detector = load_config_model(tiny_config(request.param), None)
    with torch.no_grad():
        for name, tensor in detector.model.state_dict().items():
            if "backbone" in name and tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return detector


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(pixel_values=torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))).logits


def structure(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def frozen(detector: Detector, model: nn.Module) -> list[str]:
    kinds = detector.family.frozen_batch_norm
    return [path for path, module in model.named_modules() if type(module).__name__ in kinds]


def test_thawed_norms_are_live_trainable_and_change_no_prediction(detector):
    model = copy.deepcopy(detector.model)
    norms = frozen(detector, model)
    assert norms
    assert thaw_batch_norms(model, detector.family) is model
    for path in norms:
        norm = model.get_submodule(path)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.weight.requires_grad
        assert not norm.training
    torch.testing.assert_close(logits(model), logits(detector.model), rtol=1e-4, atol=1e-5)


def test_thawed_norms_learn(detector):
    model = thaw_batch_norms(copy.deepcopy(detector.model), detector.family).train()
    path = frozen(detector, detector.model)[0]
    before = model.get_submodule(path).running_mean.clone()
    model(pixel_values=torch.rand(2, 3, 64, 64)).logits.sum().backward()
    assert not torch.equal(model.get_submodule(path).running_mean, before)
    assert model.get_submodule(path).weight.grad.abs().sum() > 0


def test_there_and_back_is_exact(detector):
    model = copy.deepcopy(detector.model)
    freeze_batch_norms(thaw_batch_norms(model, detector.family), detector.family)
    assert structure(model) == structure(detector.model)
    own, back = detector.model.state_dict(), model.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)


def test_another_epsilon_goes_into_the_variance(detector):
    model = thaw_batch_norms(copy.deepcopy(detector.model), detector.family)
    for path in frozen(detector, detector.model):
        model.get_submodule(path).eps = 0.1
    wanted = logits(model)
    assert not torch.allclose(wanted, logits(detector.model), rtol=1e-4, atol=1e-5)
    freeze_batch_norms(model, detector.family)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


LIVE = {
    "outside the backbone": tiny_config("d_fine"),
    "in the backbone": tiny_config("rt_detr, timm") | {"freeze_backbone_batch_norms": False},
    "with activations": tiny_config("rt_detr, timm")
    | {
        "freeze_backbone_batch_norms": False,
        "encoder_in_channels": [32, 48, 64],
        "backbone_config": {**TIMM, "backbone": "test_efficientnet", "out_indices": [2, 3, 4]},
    },
}


@pytest.mark.parametrize("config", LIVE.values(), ids=LIVE)
def test_norms_that_the_checkpoint_has_live_stay_live(config):
    detector = load_config_model(config, None)
    before = structure(detector.model)
    thaw_batch_norms(detector.model, detector.family)
    freeze_batch_norms(detector.model, detector.family)
    assert structure(detector.model) == before
    assert any(issubclass(kind, nn.BatchNorm2d) for kind in before.values())
