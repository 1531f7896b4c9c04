"""What was rounded to a grid is rounded again for the backward pass, instead of being kept for it.

A layer's input exists twice under fake quantization: as it came, which the gradients of step and offset need
(and which the layer before keeps in most cases: a ReLU, a softmax), and on the grid, which the gradient of
the weight needs. The second follows from the first, so autograd keeps the first alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

Again = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class _View:
    """A view of a tensor that can be computed again."""

    again: Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@dataclass(frozen=True, slots=True)
class _Noted:
    """A tensor, how often it had been written to, and how to compute it again."""

    y: ref[Tensor]
    version: int
    again: Again


# Of tensors that are alive, by the address of their memory: no other tensor can have it meanwhile.
_alive: dict[int, _Noted] = {}


def remember(y: Tensor, again: Again) -> None:
    """Note that `again()` gives y, in the same layout, for as long as somebody holds y."""
    address = y.untyped_storage().data_ptr()
    _alive[address] = _Noted(ref(y, lambda _: _alive.pop(address, None)), y._version, again)


def recomputed() -> AbstractContextManager[None]:
    """For the duration of the block, autograd keeps how to compute a remembered tensor instead of it."""
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(saved: Tensor) -> Tensor | _View:
    noted = _alive.get(saved.untyped_storage().data_ptr())
    y = None if noted is None else noted.y()
    if noted is None or y is None or y._version != noted.version or y.dtype != saved.dtype:
        return saved
    return _View(noted.again, saved.size(), saved.stride(), saved.storage_offset())


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.again().as_strided(kept.size, kept.stride, kept.offset)
