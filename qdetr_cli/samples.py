"""What a quantizer remembers while it watches: exact extremes and a fair, bounded sample of all values."""

import torch
from torch import Tensor

_BUDGET = 1 << 16  # values per quantizer
_PER_CHANNEL = 1 << 12  # but at least this many per channel


class RangeSample:
    """A uniform sample of a stream of values per channel, deterministic and of bounded size.

    Every batch is cut into equal strata and one value is drawn from each: as even as a stride, but blind to
    the periods of the data (a stride of 2^k over 256 features would see a few features only). When the sample
    is full, one of each neighbouring pair is dropped, and batches are sampled at half the rate from then on:
    every value of the stream is equally likely to be in it, whatever the number and sizes of the batches.
    """

    def __init__(self, channels: int) -> None:
        self._size = max(_BUDGET // channels, _PER_CHANNEL)
        self._rate = 1.0
        self._parts: list[Tensor] = []  # (channels, n) each
        self._kept = 0
        self._low = torch.full((channels,), torch.inf)
        self._high = torch.full((channels,), -torch.inf)
        self._random = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def add(self, x: Tensor, axis: int | None, mask: Tensor | None = None) -> bool:
        """Take in one batch; False, and nothing taken, if a value that counts is not finite."""
        rows = _rows(x.detach(), axis, mask)
        if rows.shape[1] == 0:
            return True
        low, high = (end.float().cpu() for end in rows.aminmax(dim=1))
        if not (low.isfinite().all() and high.isfinite().all()):
            return False
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        while rows.shape[1] * self._rate > self._size:
            self._halve()
        self._parts.append(self._draw(rows, max(1, round(rows.shape[1] * self._rate))).float().cpu())
        self._kept += self._parts[-1].shape[1]
        while self._kept > self._size:
            self._halve()
        return True

    @property
    def empty(self) -> bool:
        """True if no value was taken in."""
        return self._kept == 0

    def values(self) -> Tensor:
        """Return (channels, n + 2): the sample, then the exact extremes; zeros where nothing was seen."""
        ends = torch.stack((self._low, self._high), 1)
        return torch.cat((*self._parts, torch.where(ends.isfinite(), ends, 0.0)), 1)

    def _halve(self) -> None:
        self._rate /= 2
        if self._parts:
            joined = torch.cat(self._parts, 1)
            self._parts = [self._draw(joined, (joined.shape[1] + 1) // 2)]
            self._kept = self._parts[0].shape[1]

    def _draw(self, rows: Tensor, count: int) -> Tensor:
        """Return `count` columns of (channels, n): one at random from each of as many equal strata."""
        total = rows.shape[1]
        if count >= total:
            return rows.clone()
        places = torch.arange(count, dtype=torch.float64) + torch.rand(
            count, generator=self._random, dtype=torch.float64
        )
        return rows[:, (places * (total / count)).long().clamp_max_(total - 1).to(rows.device)]


def _rows(x: Tensor, axis: int | None, mask: Tensor | None) -> Tensor:
    """Return the values that count as (channels, n). The mask must be the same for all channels."""
    if axis is None:
        return (x if mask is None else x[mask.expand_as(x)]).reshape(1, -1)
    rows = x.movedim(axis, 0).flatten(1)  # (channels, n)
    if mask is None:
        return rows
    kept = mask.expand_as(x).movedim(axis, 0).flatten(1)  # (channels, n)
    assert bool((kept == kept[:1]).all()), "a mask must be the same for all channels"
    return rows[:, kept[0]]
