"""Attention with quantizers inside: dense attention as captured fx graphs, deformable as it samples.

A module stays the same object with the same names, and an instance of its class: a mixin replaces `forward`.
For dense attention that runs the graph (see `capture`) that fits the call, with a mask or without.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qdetr_cli.errors import RunError
from qdetr_cli.quantizers import FakeQuantizer

Arguments = dict[str, Any]
Signature = tuple[tuple[str, Any], ...]


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
        found = self.captured.get(signature_of(arguments))
        if found is None:
            known = "; ".join(describe(signature) for signature in self.captured)
            raise RunError(
                f"{self.path}: called with {describe(signature_of(arguments))}, but captured with {known}. "
                "Call the detector with pixel_values, pixel_mask and labels only"
            )
        return found.run(self, **{name: each for name, each in arguments.items() if isinstance(each, Tensor)})


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
        with _Sampling(self):
            return super().forward(*args, **kwargs)


class _Sampling(TorchFunctionMode):
    """Quantizes what softmax gives (B, Q, N, points) and what grid_sample reads (B * N, d, h, w)."""

    def __init__(self, attention: QuantDeformable) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        probs, value = self.attention.probs_quantizer, self.attention.v_quantizer
        if func is F.grid_sample and value is not None:
            maps = args[0].unflatten(0, (-1, self.attention.heads))  # (B, N, d, h, w)
            args = (value(maps).flatten(0, 1), *args[1:])
        result = func(*args, **(kwargs or {}))
        return probs(result) if func is F.softmax and probs is not None else result


@functools.cache
def subclass(mixin: Any, kind: Any) -> Any:
    """The class `kind` with the forward of `mixin`; an instance of it is an instance of both."""
    return type(f"{mixin.__name__}Of{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})


def bind(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of a call by name, in the order of the signature, those that equal a default left out.

    So is what goes into `**kwargs`: transformers passes it through, and eager attention does not read it.
    """
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs).arguments
    return {
        name: value
        for name, value in bound.items()
        if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        and value is not None
        and value is not signature.parameters[name].default
    }


def signature_of(arguments: Arguments) -> Signature:
    """What decides which graph fits: which arguments there are, the ranks of tensors, other values.

    Never the Python type of a tensor: under a later export these are fake tensors.
    """
    return tuple((name, f"{v.dim()}-d" if isinstance(v, Tensor) else v) for name, v in arguments.items())


def describe(signature: Signature) -> str:
    """A signature in words."""
    return ", ".join(f"{name} ({value})" for name, value in signature)
