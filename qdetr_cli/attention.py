"""Attention with quantizers inside: dense attention as captured fx graphs, deformable as it samples.

A module stays the same object with the same names, and an instance of its class: a mixin replaces `forward`.
For dense attention that runs the graph (see `capture`) that fits the call, with a mask or without.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qdetr_cli.errors import RunError
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.recomputed import recomputed
from qdetr_cli.recording import Arguments, Signature, bind, describe, leaves, signature_of


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph of an attention module, and its code: a function of the module and its tensor arguments."""

    graph: fx.Graph
    run: Callable[..., Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Captured":
        return self  # it holds no tensor: whatever it reads, it reads from the module that it is given


class QuantAttention(nn.Module):
    """Mixed into the class of a dense attention module: `forward` runs the graph that fits the call."""

    path: str
    captured: dict[Signature, Captured]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention module gives, with quantizers. RunError for a call that was never captured."""
        arguments = bind(super().forward, args, kwargs)
        signature = signature_of(arguments)
        found = self.captured.get(signature) or self.captured.get(in_mode(signature, self.training))
        if found is None:
            known = "; ".join(describe(signature) for signature in self.captured)
            raise RunError(
                f"{self.path}: called with {describe(signature)}, but captured with {known}. "
                "Call the detector with pixel_values, pixel_mask and labels only"
            )
        with recomputed():
            return found.run(self, **tensors_of(arguments))


class QuantDeformable(nn.Module):
    """Mixed into the class of a deformable attention module: its value and its weights are quantized.

    Sampling offsets, locations and the interpolation itself stay float.
    """

    path: str
    heads: int
    v_quantizer: FakeQuantizer | None
    probs_quantizer: FakeQuantizer | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention module gives, with quantizers."""
        with _Sampling(self), recomputed():
            return super().forward(*args, **kwargs)


class _Sampling(TorchFunctionMode):
    """Quantizes what softmax gives (B, Q, N, points), and the maps (B * N, d, h, w) that are read.

    They are read by grid_sample, or by an index where the sampling is discrete (RT-DETRv2).
    """

    def __init__(self, attention: QuantDeformable) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        probs, value = self.attention.probs_quantizer, self.attention.v_quantizer
        if value is not None and (func is F.grid_sample or _is_lookup(func, args)):
            maps = args[0].unflatten(0, (-1, self.attention.heads))  # (B, N, d, h, w)
            args = (value(maps).flatten(0, 1), *args[1:])
        result = func(*args, **(kwargs or {}))
        return probs(result) if func is F.softmax and probs is not None else result


def _is_lookup(func: Any, args: tuple[Any, ...]) -> bool:
    """True for `maps[batch, :, y, x]` with tensors for numbers."""
    if func is not Tensor.__getitem__ or args[0].dim() != 4 or not isinstance(args[1], tuple):
        return False
    return any(isinstance(index, Tensor) for index in args[1])


@functools.cache
def subclass(mixin: Any, kind: Any) -> Any:
    """The class `kind` with the forward of `mixin`; an instance of it is an instance of both."""
    return type(f"{mixin.__name__}Of{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})


def in_mode(signature: Signature, training: bool) -> Signature:
    """The signature of a call that computes something else in training than in eval mode."""
    return (*signature, ("training", training))


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    """What a captured graph takes: the tensors among the arguments, by name."""
    return {name: each for name, each in leaves(arguments).items() if isinstance(each, Tensor)}
