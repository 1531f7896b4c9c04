"""Which of equal scores comes first: torch does not say, the runtimes take the lower index.

On a coarse grid scores are often equal, and a detector that chooses its queries by them then chooses others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LowerIndexFirst(TorchFunctionMode):
    """Inside, `torch.topk` of the largest takes the lower index of equal values, as ONNX defines TopK."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, Tensor.topk):
            return _topk(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    ordered = torch.sort(input, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((ordered.values.narrow(dim, 0, k), ordered.indices.narrow(dim, 0, k)))
