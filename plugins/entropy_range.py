"""Range `entropy`: the symmetric clipping threshold that keeps a histogram closest to itself (TensorRT's
calibration).

In a recipe: plugins: [plugins], and in a format: {init: entropy} or {init: {name: entropy, bins: 1024}}.
"""

import torch
from torch import Tensor

from qdetr_cli import plugins
from qdetr_cli.recipe import QuantFormat


@plugins.register("range", "entropy")
def entropy(values: Tensor, format: QuantFormat, *, bins: int = 2048) -> tuple[Tensor, Tensor]:
    """Return [-t, t], cut to what occurs, for the threshold t with the least divergence per channel."""
    high = torch.stack([_threshold(row.abs(), 1 << format.bits, bins) for row in values])
    return torch.maximum(-high, values.amin(1)), torch.minimum(high, values.amax(1))


def _threshold(magnitudes: Tensor, levels: int, bins: int) -> Tensor:
    """Return the best of 64 thresholds, ()."""
    top = magnitudes.max()
    if top == 0:
        return top
    counts = torch.histc(magnitudes, bins=bins, min=0.0, max=float(top))
    ends = sorted(set(torch.linspace(max(levels, bins // 64), bins, 64).long().tolist()))
    divergences = torch.stack([_divergence(counts, end, levels) for end in ends])
    best: int = ends[int(divergences.argmin())]
    return top * (best / bins)


def _divergence(counts: Tensor, end: int, levels: int) -> Tensor:
    """Return KL(clipped || quantized) of a histogram that is clipped after `end` bins, ()."""
    clipped = counts[:end].clone()
    clipped[-1] += counts[end:].sum()
    level = torch.arange(end) * levels // end  # the level that each bin falls into
    filled = (counts[:end] > 0).float()
    mass = torch.zeros(levels).index_add_(0, level, counts[:end])
    share = torch.zeros(levels).index_add_(0, level, filled)
    quantized = (mass / share.clamp_min(1))[level] * filled
    p, q = clipped / clipped.sum(), quantized / quantized.sum().clamp_min(1)
    divergence: Tensor = (p * ((p + 1e-12) / (q + 1e-12)).log()).sum()
    return divergence
