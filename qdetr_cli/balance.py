"""Balance of q and k: what one step for a whole head rounds badly is evened out, attention stays the same.

    softmax(q k') = softmax((gain * q) ((k - center) / gain)')

for any gain of each dimension of a head, since it cancels in the product, and any center, since it adds one
number to all scores of a query. Few bits want all dimensions of equal size, on both sides: with gain =
sqrt(rms(k) / rms(q)) both have sqrt(rms(q) rms(k)), and the errors of both roundings, with steps that follow
the rms of a head, add to the least sum. Conditional-DETR puts content and positions side by side in one head:
there rms(k) / rms(q) of the two differ 20 times. Scaling as in SmoothQuant (Xiao et al., ICML 2023,
equation 4), which OmniQuant (Shao et al., ICLR 2024) has for q and k; centering as in SageAttention (Zhang et
al., ICLR 2025).
"""

import torch
from torch import Tensor, nn

from qdetr_cli.head_fit import HeadFit

_LEAST = 1e-3  # of the mean over a head's dimensions: what is smaller counts as this


class Operand(HeadFit):
    """One side of the product: (x - center) * gain, for each dimension of a head.

    `gain` and `center` are (N, d); with 1 and 0, before they are fitted, x is passed on. q (axis -1) has no
    center, which would change the scores.
    """

    center: nn.Parameter | None

    def __init__(self, heads: int, dimensions: int, *, axis: int) -> None:
        super().__init__(heads, dimensions, axis=axis)
        self.gain = nn.Parameter(torch.ones(heads, dimensions))
        self.center = nn.Parameter(torch.zeros(heads, dimensions)) if axis == -2 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x centered and scaled, same shape and dtype; x itself while it is observed."""
        if self._sums is not None:
            self._observe(x)
            return x
        centered = x if self.center is None else x - self._along(self.center)
        return (centered * self._along(self.gain)).to(x.dtype)

    def finish_observing(self) -> tuple[Tensor, ...] | None:
        """Return the mean and the mean square, float64 (N, d), of what was seen; None if nothing was."""
        return self._means()

    def _seen(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, x.square())


class Balance(nn.Module):
    """Both sides of one product of q and k, which are fitted together."""

    def __init__(self, heads: int, dimensions: int) -> None:
        super().__init__()
        self.q = Operand(heads, dimensions, axis=-1)
        self.k = Operand(heads, dimensions, axis=-2)

    def start_observing(self) -> None:
        """Begin to collect what the fit needs, from nothing."""
        self.q.start_observing()
        self.k.start_observing()

    @torch.no_grad()
    def finish_observing(self) -> bool:
        """Set gains and center from what was seen; False if nothing was, and then all passes unchanged."""
        q, k = self.q.finish_observing(), self.k.finish_observing()
        if q is None or k is None:
            return False
        center, square = k
        rms_q, rms_k = _rms(q[1]), _rms(square - center.square())
        gain = (rms_k / rms_q).sqrt()
        self.q.gain.copy_(gain)
        self.k.gain.copy_(1 / gain)
        assert self.k.center is not None
        self.k.center.copy_(center)
        return True


def _rms(square: Tensor) -> Tensor:
    """The root of a mean square, (N, d), not below a part of its head's mean; 1 where a head is all 0."""
    rms = square.clamp(min=0).sqrt()
    rms = torch.maximum(rms, _LEAST * rms.mean(1, keepdim=True))
    return torch.where(rms > 0, rms, 1.0)
