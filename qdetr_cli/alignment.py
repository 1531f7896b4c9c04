"""Distribution alignment (DA) of Q-DETR: what is quantized gets the shape of a normal distribution first.

    q* = (q - mean(q)) / sqrt(var(q) + 1e-5) * gamma + beta          (Q-DETR, CVPR 2023, inner level of DRD)

per token and head, over the head's dimensions. It changes the function, so gamma and beta begin as the
least-squares fit of q* to q over the calibration images: a float checkpoint is nearly preserved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.errors import RunError

EPSILON = 1e-5
_FLAT = 1e-6  # a channel whose normed values vary less keeps the average gain


class DistributionAlignment(nn.Module):
    """Normalises (B, N, .., ..) over the head's dimensions, then scales and shifts each dimension of a head.

    `axis` is the dimension of x that holds the head's dimensions: -1 for q (B, N, L, d), -2 for the
    transposed k (B, N, d, L) of a product. `gamma` and `beta` are (N, d). Until it is fitted it passes x on.
    """

    fitted: Tensor
    _moments: tuple[Tensor, ...] | None

    def __init__(self, heads: int, dimensions: int, *, axis: int) -> None:
        super().__init__()
        assert axis in (-1, -2)
        self.axis = axis
        self.path = ""  # set by `rewrite`, for messages
        self.gamma = nn.Parameter(torch.ones(heads, dimensions))
        self.beta = nn.Parameter(torch.zeros(heads, dimensions))
        self.register_buffer("fitted", torch.tensor(False))
        self._ready = False  # `fitted` as a plain bool, so that no branch depends on a tensor
        self._moments = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x aligned, same shape and dtype; x itself while it is fitted, or was never."""
        if self._moments is not None:
            self._observe(x)
            return x
        if not self._ready:
            return x
        return (self._normed(x.float()) * self._along(self.gamma) + self._along(self.beta)).to(x.dtype)

    def start_observing(self) -> None:
        """Begin to collect what the fit needs, from nothing."""
        zeros = torch.zeros_like(self.gamma, dtype=torch.float64, device="cpu")
        self._moments = (torch.zeros((), dtype=torch.float64), *(zeros.clone() for _ in range(4)))

    @torch.no_grad()
    def finish_observing(self) -> bool:
        """Fit gamma and beta to what was seen; False if nothing was, and then alignment stays off."""
        assert self._moments is not None, "finish_observing without start_observing"
        (count, x, n, nn_, nx), self._moments = self._moments, None
        if not count:
            return False
        mean_x, mean_n = x / count, n / count
        variance, covariance = nn_ / count - mean_n**2, nx / count - mean_n * mean_x
        gain = covariance / variance.clamp(min=_FLAT)
        gain = torch.where(variance > _FLAT, gain, gain.mean())
        self.gamma.copy_(gain)
        self.beta.copy_(mean_x - gain * mean_n)
        self.fitted.fill_(True)
        self._ready = True
        return True

    def _normed(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=self.axis, correction=0, keepdim=True)
        return (x - mean) * (variance + EPSILON).rsqrt()

    def _along(self, parameter: Tensor) -> Tensor:
        """(N, d) shaped to broadcast against (B, N, L, d) or (B, N, d, L)."""
        return parameter[:, None, :] if self.axis == -1 else parameter[:, :, None]

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        assert self._moments is not None
        x = x.double()
        if not x.isfinite().all():
            raise RunError(f"{self.path}: met values that are not finite while it was fitted")
        normed = self._normed(x)
        tokens = (0, 2) if self.axis == -1 else (0, 3)
        seen = (x, normed, normed * normed, normed * x)
        count = x.new_tensor(x.numel() / self.gamma.numel())
        sums = (count, *(each.sum(tokens) for each in seen))
        self._moments = tuple(old + new.cpu() for old, new in zip(self._moments, sums, strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = not self.fitted.is_meta and bool(self.fitted)

    def extra_repr(self) -> str:
        """Return its size for `print(model)`."""
        heads, dimensions = self.gamma.shape
        return f"{heads} heads of {dimensions}, axis={self.axis}"
