"""Distribution alignment (DA) of Q-DETR: what is quantized gets the shape of a normal distribution first.

    q* = (q - mean(q)) / sqrt(var(q) + 1e-5) * gamma + beta          (Q-DETR, CVPR 2023, inner level of DRD)

per token and head, over the head's dimensions. It changes the function, so gamma and beta begin as the
least-squares fit of q* to q over the calibration images: a float checkpoint is nearly preserved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.head_fit import HeadFit

EPSILON = 1e-5
_FLAT = 1e-6  # a channel whose normed values vary less keeps the average gain


class DistributionAlignment(HeadFit):
    """Normalises (B, N, .., ..) over the head's dimensions, then scales and shifts each dimension of a head.

    `gamma` and `beta` are (N, d). Until it is fitted it passes x on.
    """

    fitted: Tensor

    def __init__(self, heads: int, dimensions: int, *, axis: int) -> None:
        super().__init__(heads, dimensions, axis=axis)
        self.gamma = nn.Parameter(torch.ones(heads, dimensions))
        self.beta = nn.Parameter(torch.zeros(heads, dimensions))
        self.register_buffer("fitted", torch.tensor(False))
        self._ready = False  # `fitted` as a plain bool, so that no branch depends on a tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return x aligned, same shape and dtype; x itself while it is fitted, or was never."""
        if self._sums is not None:
            self._observe(x)
            return x
        if not self._ready:
            return x
        return (self._normed(x.float()) * self._along(self.gamma) + self._along(self.beta)).to(x.dtype)

    @torch.no_grad()
    def finish_observing(self) -> bool:
        """Fit gamma and beta to what was seen; False if nothing was, and then alignment stays off."""
        means = self._means()
        if means is None:
            return False
        mean_x, mean_n, mean_nn, mean_nx = means
        variance, covariance = mean_nn - mean_n**2, mean_nx - mean_n * mean_x
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

    def _seen(self, x: Tensor) -> tuple[Tensor, ...]:
        normed = self._normed(x)
        return (x, normed, normed * normed, normed * x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = not self.fitted.is_meta and bool(self.fitted)
