"""Batch norms folded into the convolutions before them, whichever class of frozen or plain batch norm it is.

With fixed statistics a batch norm is one scale and one shift per channel. They are read off its outputs, so
that no knowledge is needed of each library's copy, with its own epsilon and its own names. What a batch norm
does besides, as timm's that drop and activate, is in its children and stays.
"""

import copy
from collections.abc import Iterable

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

# those of the libraries that backbones come from; each family of transformers has a frozen one of its own too
BATCH_NORMS = (nn.BatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d, FrozenBatchNorm2d)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold each (convolution path, batch-norm path) in place; what is left takes the batch norm's place.

    The convolution keeps its weight Parameter, scaled, and gains a bias, trainable where the weight is.
    """
    for conv_path, norm_path in pairs:
        conv = model.get_submodule(conv_path)
        assert isinstance(conv, nn.Conv2d)
        norm = model.get_submodule(norm_path)
        scale, shift = affine(norm, conv.out_channels)
        bias = shift if conv.bias is None else shift + scale * conv.bias.double()
        weight = conv.weight.double() * scale[:, None, None, None]  # (D_out, D_in / groups, h, w)
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
        model.set_submodule(norm_path, _rest(norm).train(norm.training))


def _rest(norm: nn.Module) -> nn.Module:
    """What follows scale and shift: timm's `drop` and `act`, or nothing, an Identity."""
    steps = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(*steps) if steps else nn.Identity()


def affine(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """The scale and shift (channels,), float64, of a batch norm in eval mode, its children left out."""
    norm = copy.deepcopy(norm).double().eval()
    for name, _ in norm.named_children():
        setattr(norm, name, nn.Identity())
    points = torch.arange(3.0, dtype=torch.float64, device=_device(norm))[:, None, None, None]
    shift, at_one, at_two = norm(points.expand(3, channels, 1, 1))[..., 0, 0]  # (3, channels)
    scale = at_one - shift
    assert torch.allclose(at_two - at_one, scale), f"{type(norm).__name__} is not affine per channel"
    return scale, shift


def _device(norm: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*norm.parameters(), *norm.buffers())), torch.device("cpu"))
