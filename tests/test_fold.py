"""Folding: each library's batch norm, against the unfolded pair."""

import copy
from functools import partial

import pytest
import torch
from quantized_detectors import float_model
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrFrozenBatchNorm2d
from transformers.models.d_fine.modeling_d_fine import DFineFrozenBatchNorm2d
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d

from qdetr_cli.families import family_of
from qdetr_cli.fold import affine, fold_batch_norms
from qdetr_cli.trace import trace

NORMS = {
    "plain": lambda: nn.BatchNorm2d(8, eps=1e-3),
    "plain, not affine": lambda: nn.BatchNorm2d(8, affine=False),
    "detr": lambda: DetrFrozenBatchNorm2d(8),
    "conditional_detr": lambda: ConditionalDetrFrozenBatchNorm2d(8),
    "rt_detr": lambda: RTDetrFrozenBatchNorm2d(8),
    "d_fine": lambda: DFineFrozenBatchNorm2d(8),
    "torchvision": lambda: FrozenBatchNorm2d(8, eps=1e-4),
    "timm": lambda: FrozenBatchNormAct2d(8, apply_act=False),
}


def pair(norm: nn.Module, *, bias: bool = False, groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 2.0) if name == "running_var" else value.normal_()
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=bias, groups=groups), norm).eval()


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"groups": 4}], ids=["plain", "bias", "groups"])
@pytest.mark.parametrize("kind", NORMS)
def test_folded_equals_the_pair(kind: str, options: dict) -> None:
    """Borders too: zero padding comes before the convolution, so folding is exact there."""
    float_pair = pair(NORMS[kind](), **options).double()
    folded = copy.deepcopy(float_pair)
    fold_batch_norms(folded, [("0", "1")])
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), float_pair(x), rtol=0, atol=1e-13)


def test_affine_uses_the_batch_norms_own_epsilon() -> None:
    norm = nn.BatchNorm2d(2, eps=0.5)
    norm.running_var.copy_(torch.tensor([0.5, 3.5]))
    norm.running_mean.fill_(2.0)
    norm.bias.data.fill_(1.0)
    scale, shift = affine(norm, 2)
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(shift, torch.tensor([-1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("trainable", [True, False])
def test_weight_stays_the_same_parameter_and_bias_trains_with_it(trainable: bool) -> None:
    model = pair(nn.BatchNorm2d(8))
    weight = model[0].weight.requires_grad_(trainable)
    fold_batch_norms(model, [("0", "1")])
    assert model[0].weight is weight
    assert weight.requires_grad is model[0].bias.requires_grad is trainable
    assert weight.is_leaf
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("kind", [BatchNormAct2d, FrozenBatchNormAct2d], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity], ids=lambda act: act.__name__)
def test_activations_and_drops_inside_a_batch_norm_stay(kind: type, act: type) -> None:
    norm = kind(8, eps=1e-3, act_layer=act, drop_layer=partial(nn.Dropout2d, 0.5))
    float_pair = pair(norm).double()
    folded = copy.deepcopy(float_pair)
    fold_batch_norms(folded, [("0", "1")])
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(folded(x), float_pair(x), rtol=0, atol=1e-13)
    assert [type(child) for child in folded[1]] == [nn.Dropout2d, *([act] if act is not nn.Identity else [])]
    folded.train()
    assert (folded(x) == 0).flatten(2).all(-1).any()  # whole channels are dropped


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def test_a_norm_that_is_no_scale_and_shift_is_refused() -> None:
    with pytest.raises(AssertionError, match="Square is not affine"):
        fold_batch_norms(pair(Square()), [("0", "1")])


@pytest.mark.parametrize("name", ["detr", "conditional_detr, timm", "rt_detr", "d_fine", "deformable_detr"])
def test_no_batch_norm_is_left_in_a_detector(name: str) -> None:
    """Frozen ones, plain ones, those of RepVGG branches."""
    model = float_model(name)
    fold_batch_norms(model, trace(model, family_of(model), (64, 96)).batch_norms)
    assert not [path for path, module in model.named_modules() if "BatchNorm" in type(module).__name__]
