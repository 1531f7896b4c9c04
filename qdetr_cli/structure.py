"""What a module's code may read beside the values of its tensors: modules of equal structure export alike."""

import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Answer = TypeVar("Answer")

_UNREAD = {*vars(nn.Module()), "name_or_path"}  # children, tensors, hooks, mode, and the folder of origin
_PLAIN = (
    *(int, float, str, bytes, type(None), Enum, torch.dtype, torch.device),
    *(types.FunctionType, types.BuiltinFunctionType),
)


class Remembered(Generic[Answer]):
    """Answers about structures, for all models of this process. The oldest are forgotten."""

    def __init__(self, most: int) -> None:
        self._answers: OrderedDict[Hashable, Answer] = OrderedDict()
        self._most = most

    def get(self, key: Hashable, ask: Callable[[], Answer]) -> Answer:
        """The answer for `key`; asked for if it is new. The answer must hold no tensor, and is shared."""
        if key not in self._answers:
            self._answers[key] = ask()
            if len(self._answers) > self._most:
                self._answers.popitem(last=False)
        return self._answers[key]


def structure(module: nn.Module) -> Hashable:
    """Equal for modules whose code, on equal arguments and in equal modes, calls the same operations.

    That is classes, names, plain attributes and configs of the module and all below it, and of each tensor
    the names (several, where it is shared), shape, kind and device.
    """
    first: dict[int, str] = {}
    held = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    tensors = tuple((name, first.setdefault(id(value), name), _kind(value)) for name, value in held)
    parts = tuple(
        (path, type(part), part.extra_repr(), _attributes(part))
        for path, part in module.named_modules(remove_duplicate=False)
    )
    return parts, tensors


def _kind(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _attributes(module: nn.Module) -> tuple[Hashable, ...]:
    return tuple(
        (name, _content(value)) for name, value in sorted(vars(module).items()) if name not in _UNREAD
    )


def _content(value: Any) -> Any:
    """What code may read of an attribute; of what is none of these, that it is there."""
    if isinstance(value, _PLAIN):
        return type(value), value  # 1, 1.0 and True are equal, and give unlike graphs
    if isinstance(value, Tensor):
        return _kind(value)
    if isinstance(value, list | tuple):
        return tuple(map(_content, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(_content, value))
    if isinstance(value, dict):
        return tuple((key, _content(each)) for key, each in value.items())
    if hasattr(value, "to_json_string"):  # a transformers config
        return value.to_json_string(), getattr(value, "_attn_implementation", None)
    return type(value)
