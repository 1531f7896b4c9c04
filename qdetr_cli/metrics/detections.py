"""What a model found, and averages over what is there. Shape letter: K detections of one image."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EMPTY = -1.0  # the number of an average over nothing, as pycocotools writes it; None in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Found in one image: `boxes` (K, 4) corners in pixels, `scores` (K,), `labels` (K,) class index."""

    image_id: int
    boxes: Reals
    scores: Reals
    labels: Ints


def mean_of(values: Iterable[float]) -> float:
    """Mean of the numbers that are there, -1 when there is none."""
    there = [value for value in values if value != EMPTY]
    return float(np.mean(there)) if there else EMPTY
