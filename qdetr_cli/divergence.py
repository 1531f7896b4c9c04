"""A training whose numbers are no longer finite: how that is found, and what is said of it."""

import math

import torch
from torch import Tensor, nn

from qdetr_cli.errors import DivergedError
from qdetr_cli.processes import mean


def finite_means(terms: dict[str, Tensor]) -> dict[str, float]:
    """The loss and its terms, means over the processes. Raises DivergedError in all, if in one.

    `terms` has the scalar `loss`, and what it is made of; a term alone may be infinite.
    """
    values = mean(torch.stack([value.float() for value in terms.values()])).tolist()
    told: dict[str, float] = dict(zip(terms, values, strict=True))
    if not math.isfinite(told["loss"]):
        listed = ", ".join(f"{name}={value:.4g}" for name, value in told.items() if name != "loss")
        raise DivergedError(f"the loss is not finite ({listed})")
    return told


def diverged(what: object, model: nn.Module, step: int, *, gradient: bool = False) -> DivergedError:
    """The error that names the step, what was not finite, the first bad module and the way out."""
    return DivergedError(
        f"step {step}: {what}; first bad module: {_broken(model, gradient=gradient)}. "
        "`last/` holds the evaluation before; lower train.lr, set train.clip or give the module more bits"
    )


def _broken(model: nn.Module, *, gradient: bool) -> str:
    """The path of the first parameter whose value (or gradient) is not finite."""
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradient else parameter
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return name
    return "none (the values overflow between modules)"
