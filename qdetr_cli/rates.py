"""Learning rates: AdamW's parameter groups.

AdamW moves every parameter by about its learning rate in one update, whatever the gradient's size. Steps of a
quantizer differ by orders of magnitude (0.5 for 3 bits of a feature map, 0.002 for 8 bits of a small weight),
so one rate for all would leave some where they are and let others jump: theirs is relative to their size.
"""

import math
from typing import Any

from torch import nn

from qdetr_cli.families import Family, role_of
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.recipe import Train, role_matches

Key = tuple[float, float]  # learning rate, weight decay


def parameter_groups(model: nn.Module, family: Family, train: Train) -> list[dict[str, Any]]:
    """AdamW groups: the backbone, the rest and the quantizers have rates of their own.

    Matrices and kernels decay; steps, offsets, alignments, balances, norms and biases do not. What is
    backbone is a matter of roles: not in every family does its path say so.
    """
    own = _quantizer_rates(model, train.quantizer_lr)
    groups: dict[Key, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = own.get(parameter, _rate(name, family, train))
            gains = "_alignment." in name or ".balance." in name  # one for each dimension of each head
            decays = parameter.ndim > 1 and not gains
            groups.setdefault((rate, train.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _quantizer_rates(model: nn.Module, relative: float) -> dict[nn.Parameter, float]:
    """The rate of each step, relative to its mean (to the next power of two, so that groups are few).

    Offsets count in steps: theirs is relative to the grid's upper end.
    """
    rates: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            size = max(float(module.step.detach().abs().mean()), 1e-12)
            rates[module.step] = relative * 2.0 ** round(math.log2(size))
            if module.offset is not None:
                rates[module.offset] = relative * module.format.qmax
    return rates


def _rate(name: str, family: Family, train: Train) -> float:
    return train.backbone_lr if role_matches("backbone", role_of(family, name)) else train.lr
