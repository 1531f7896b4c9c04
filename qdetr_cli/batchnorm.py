"""Batch norms of a backbone, frozen (constants, as in checkpoints) or live (for training from scratch)."""

import sys
from typing import Any

import torch
from torch import nn

from qdetr_cli.families import Family

FROZEN_EPS = 1e-5  # written into the forward of every family's frozen batch norm
STATISTICS = ("weight", "bias", "running_mean", "running_var")


class ThawedBatchNorm2d(nn.BatchNorm2d):
    """A live batch norm where the checkpoint has a frozen one."""


def thaw_batch_norms(model: nn.Module, family: Family) -> nn.Module:
    """The model, its frozen batch norms now `ThawedBatchNorm2d`: in place, names and statistics unchanged.

    Outputs in eval mode stay the same up to rounding. The new weights and biases are trainable; the new
    modules are in the mode (train or eval) of the model.
    """
    frozen = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if type(child).__name__ in family.frozen_batch_norm
    ]
    for parent, name, norm in frozen:
        setattr(parent, name, _live(norm).train(model.training))
    return model


def freeze_batch_norms(model: nn.Module, family: Family) -> nn.Module:
    """The model, its thawed batch norms now the family's frozen kind: in place, names unchanged.

    The way back from `thaw_batch_norms`. Batch norms that are live in the checkpoint, those of input
    projections, convolutional encoders and backbones that are not frozen, stay so.
    """
    live = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, ThawedBatchNorm2d)
    ]
    for parent, name, norm in live:
        kind = getattr(sys.modules[type(model).__module__], family.frozen_batch_norm[0])
        setattr(parent, name, _frozen(norm, kind))
    return model


@torch.no_grad()
def _live(norm: Any) -> ThawedBatchNorm2d:
    live = ThawedBatchNorm2d(norm.weight.numel(), eps=FROZEN_EPS, device=norm.weight.device)
    for name in STATISTICS:
        getattr(live, name).copy_(getattr(norm, name))
    return live


@torch.no_grad()
def _frozen(norm: nn.BatchNorm2d, kind: Any) -> nn.Module:
    """The norm as constants; another epsilon than the frozen kind's goes into the variance."""
    frozen: nn.Module = kind(norm.num_features).to(norm.weight.device)
    for name in STATISTICS:
        getattr(frozen, name).copy_(getattr(norm, name))
    frozen.get_buffer("running_var").add_(norm.eps - FROZEN_EPS)
    return frozen
