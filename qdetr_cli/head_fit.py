"""What alignment and balance share: parameters of a head's dimensions, fitted to means over tokens."""

import torch
from torch import Tensor, nn

from qdetr_cli.errors import RunError


class HeadFit(nn.Module):
    """A module that sees (B, N, .., ..) and has parameters (N, d), one for each dimension of a head.

    `axis` is the dimension of x that holds the head's dimensions: -1 for q (B, N, L, d), -2 for the
    transposed k (B, N, d, L) of a product. Whoever inherits says in `_seen` what is averaged for its fit.
    """

    _sums: tuple[Tensor, ...] | None

    def __init__(self, heads: int, dimensions: int, *, axis: int) -> None:
        super().__init__()
        assert axis in (-1, -2)
        self.heads, self.dimensions, self.axis = heads, dimensions, axis
        self.path = ""  # set by `rewrite`, for messages
        self._sums = None

    def start_observing(self) -> None:
        """Begin to collect what the fit needs, from nothing."""
        self._sums = ()

    def extra_repr(self) -> str:
        """Return its size for `print(model)`."""
        return f"{self.heads} heads of {self.dimensions}, axis={self.axis}"

    def _seen(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is averaged over the tokens of x, float64, each of its shape."""
        raise NotImplementedError

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        assert self._sums is not None
        x = x.double()
        if not x.isfinite().all():
            raise RunError(f"{self.path}: met values that are not finite while it was fitted")
        tokens = (0, 2) if self.axis == -1 else (0, 3)
        count = x.new_tensor(x.numel() / (self.heads * self.dimensions))
        sums = tuple(each.cpu() for each in (count, *(each.sum(tokens) for each in self._seen(x))))
        before = self._sums or tuple(torch.zeros_like(each) for each in sums)
        self._sums = tuple(old + new for old, new in zip(before, sums, strict=True))

    def _means(self) -> tuple[Tensor, ...] | None:
        """The means, (N, d) each, of all that was seen since `start_observing`; None if nothing was."""
        assert self._sums is not None, "finish_observing without start_observing"
        sums, self._sums = self._sums, None
        return tuple(each / sums[0] for each in sums[1:]) if sums and sums[0] else None

    def _along(self, parameter: Tensor) -> Tensor:
        """(N, d) shaped to broadcast against (B, N, L, d) or (B, N, d, L)."""
        return parameter[:, None, :] if self.axis == -1 else parameter[:, :, None]
