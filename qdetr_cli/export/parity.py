"""Does a file compute what its model computes? Its outputs, and each of its layers alone.

Sums in another order move a value now and then to the next code of its grid, and what follows moves with it:
at 4 bits that is plainly seen in the outputs. So do the biases of ONNX Runtime's integer convolutions, which
are whole multiples of the step of their products. How much it can matter is measured on the model itself,
which runs again with the noise of rounding added to what each layer and each quantizer gets. A file that is
much further away than that is wrong, unless each of its layers, and what it makes of the last, is right where
the model's own codes are put in before: see `layers`.

SQNR is the signal-to-noise ratio 10 log10(sum x^2 / sum (x - y)^2), in dB.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from qdetr_cli.data import Batch
from qdetr_cli.errors import ExportError
from qdetr_cli.export.layers import LayerParity, inside
from qdetr_cli.export.probes import Arrays
from qdetr_cli.export.program import OUTPUTS
from qdetr_cli.export.rounding import ENOUGH, decibels, has_whole_biases, least, rounding_noise, sqnr
from qdetr_cli.export.ties import LowerIndexFirst
from qdetr_cli.instructions import sums_overflow

KEPT = 0.95  # part of the queries that count: near ties choose other queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How near the file is to the model in one output."""

    largest: float  # difference of one number, over all images and the queries that count
    sqnr: float  # dB; the median over images
    rounding: float  # dB; the same of the model itself under the noise of rounding
    alone: float | None  # dB; of what the file gives from the model's codes, on one image; None: not seen

    @property
    def least(self) -> float:
        """The SQNR below which the file is wrong."""
        return least(self.rounding)

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference, here or in the layers before, which are judged alone."""
        return self.sqnr >= self.least or (self.alone is not None and self.alone >= ENOUGH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How near a file is to its model on some images."""

    images: int
    logits: Agreement
    boxes: Agreement
    layers: tuple[LayerParity, ...]  # of the first image, in the order in which they run

    @property
    def first_wrong(self) -> LayerParity | None:
        """The first layer whose difference rounding cannot explain."""
        return next((each for each in self.layers if not each.holds), None)

    @property
    def holds(self) -> bool:
        """Whether rounding explains every difference."""
        return self.logits.holds and self.boxes.holds and self.first_wrong is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "holds": self.holds}

    def lines(self) -> Iterator[str]:
        """What a user reads."""
        yield f"file against model on {self.images} images (SQNR; in brackets what rounding alone does):"
        for name, each in (("logits", self.logits), ("boxes", self.boxes)):
            yield (
                f"  {name:6} {decibels(each.sqnr)} ({decibels(each.rounding)}), "
                f"largest difference {each.largest:.2g}"
            )
        alone = [each.moved for each in self.layers if each.moved is not None]
        if alone:
            exact = sum(not each for each in alone)
            yield (
                f"  {len(alone)} quantizers, each alone: {exact} give the same codes, "
                f"the others move at most {100 * max(alone):.2g} % of theirs"
            )


@torch.no_grad()
def compare(reference: nn.Module, candidate: nn.Module, batch: Batch, path: Path | None = None) -> Parity:
    """How near `candidate`, a file as a module, is to `reference` on the images of `batch`.

    Both take pixel_values and pixel_mask. Raises ExportError where rounding cannot explain the difference;
    it names the first layer that deviates, where the file at `path` tells.
    """
    given = {"pixel_values": batch.pixel_values, "pixel_mask": batch.pixel_mask}
    found = _outputs(candidate(**given))
    with LowerIndexFirst():
        wanted = _outputs(reference(**given))
        with rounding_noise(reference, whole_biases=has_whole_biases(path)):
            noisy = _outputs(reference(**given))
    near, noise = _paired(wanted, found), _paired(wanted, noisy)
    first = {name: each[:1] for name, each in given.items()}
    seen = None if path is None else inside(reference, path, first)
    alone = {} if seen is None else _alone(wanted, seen.outputs)
    parity = Parity(
        images=len(batch.pixel_values),
        layers=() if seen is None else seen.layers,
        **{name: _agreement(near[name], noise[name], alone.get(name)) for name in near},
    )
    if not parity.holds:
        raise ExportError("\n".join(_explained(parity)))
    return parity


def _outputs(outputs: Any) -> tuple[Tensor, Tensor]:
    """logits (B, Q, C) and boxes (B, Q, 4)."""
    return outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()


def _alone(wanted: tuple[Tensor, Tensor], found: Arrays) -> dict[str, float]:
    """The SQNR of each output of the first image that the file gives from the model's codes."""
    if not found:
        return {}
    pairs = _paired((wanted[0][:1], wanted[1][:1]), _first(found))
    return {name: sqnr(x, y) for name, ((x, y),) in pairs.items()}


def _first(found: Arrays) -> tuple[Tensor, Tensor]:
    """logits (1, Q, C) and boxes (1, Q, 4) of the first image."""
    logits, boxes = (torch.from_numpy(np.array(found[name][:1], np.float32)) for name in OUTPUTS)
    return logits, boxes


Pairs = dict[str, list[tuple[Tensor, Tensor]]]


def _paired(wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> Pairs:
    """For each output and image, what was wanted and found, (K, ..): queries that belong together."""
    pairs: Pairs = {"logits": [], "boxes": []}
    for image in range(len(wanted[0])):
        mine = [each[image] for each in wanted]
        theirs = [each[image].nan_to_num(nan=1e6) for each in found]
        rows, columns = _matched(mine, theirs)
        for name, x, y in zip(pairs, mine, theirs, strict=True):
            pairs[name].append((x[rows], y[columns]))
    return pairs


def _matched(x: list[Tensor], y: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The queries of x and those of y that are nearest to them, one to one, less those that are furthest."""
    spread = [each.std().clamp_min(1e-6) for each in x]
    cost = sum(torch.cdist(a / s, b / s, p=1) for a, b, s in zip(x, y, spread, strict=True))
    assert isinstance(cost, Tensor)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.numpy()))
    kept = cost[rows, columns].argsort()[: max(1, int(np.ceil(KEPT * len(rows))))]
    return rows[kept], columns[kept]


def _agreement(
    near: list[tuple[Tensor, Tensor]], noise: list[tuple[Tensor, Tensor]], alone: float | None
) -> Agreement:
    return Agreement(
        largest=max(float((x - y).abs().max()) for x, y in near),
        sqnr=float(np.median([sqnr(x, y) for x, y in near])),
        rounding=float(np.median([sqnr(x, y) for x, y in noise])),
        alone=alone,
    )


def _explained(parity: Parity) -> Iterator[str]:
    yield "the file does not compute what the model computes, so it was not kept"
    yield from parity.lines()
    if parity.first_wrong is not None:
        yield f"first layer that deviates: {parity.first_wrong}"
    yield from (f"  {each}" for each in parity.layers)
    if sums_overflow():
        yield (
            "this processor has no VNNI: a file that is not portable adds products of 8 bits in 16, and "
            "cuts what does not fit; write it with --portable, or on a processor with VNNI"
        )
