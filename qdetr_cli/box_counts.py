"""What the box losses are divided by when several processes share a batch: the boxes of all of them.

DDP averages gradients, so each process divides by the mean over the processes. transformers does so in some
families, divides by its own boxes in others (RT-DETR's line), and by too few in the rest (DETR's line divides
the mean by the number of processes again).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.loss.loss_for_object_detection import ImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from qdetr_cli.errors import DivergedError
from qdetr_cli.matching import Labels
from qdetr_cli.processes import mean, world

Indices = Sequence[tuple[Tensor, Tensor]]  # for each image the matched queries and objects


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxCounts:
    """Boxes of a batch, and those that a query can be matched to: this process's, and the mean over all."""

    own: float
    mean: float
    own_matched: float
    mean_matched: float


def box_counts(labels: Labels, queries: int, *, finite: bool) -> BoxCounts:
    """The counts of a batch for `queries` queries an image. A meeting of all processes.

    Raises DivergedError on all of them where the predictions of one are not `finite`.
    """
    sizes = [len(each["class_labels"]) for each in labels]
    own = torch.tensor([sum(sizes), sum(min(size, queries) for size in sizes), not finite]).double()
    over_all = mean(own)
    if over_all[2] > 0:
        raise DivergedError("the predictions are not finite")
    return BoxCounts(
        own=float(own[0]),
        mean=float(over_all[0]),
        own_matched=float(own[1]),
        mean_matched=float(over_all[1]),
    )


@contextmanager
def divided_by_all(counts: BoxCounts) -> Iterator[None]:
    """For the duration of the block transformers' criteria divide by the mean number of boxes.

    The criterion of another package, which has no `get_loss`, stays as it is.
    """
    if world() == 1:
        yield
        return

    def adjust(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, ImageLoss):
            module.get_loss = _of_image_loss(module, counts)
        elif isinstance(module, RTDetrLoss):
            module.get_loss = _of_rt_detr_loss(module, counts)

    handle = register_module_forward_pre_hook(adjust)
    try:
        yield
    finally:
        handle.remove()


def _of_image_loss(criterion: Any, counts: BoxCounts) -> Callable[..., dict[str, Tensor]]:
    """`get_loss` of DETR's line, divided by the boxes of all; softmax classes by the weights of all."""
    own = criterion.get_loss

    def get_loss(loss: str, outputs: Any, targets: Any, indices: Indices, boxes: float) -> dict[str, Tensor]:
        values: dict[str, Tensor] = own(loss, outputs, targets, indices, max(counts.mean, 1.0))
        if loss == "labels" and hasattr(criterion, "empty_weight"):  # a mean, weighted by eos_coef
            queries = outputs["logits"].shape[0] * outputs["logits"].shape[1]
            share = _weight(counts.own_matched, queries, criterion.eos_coef) / _weight(
                counts.mean_matched, queries, criterion.eos_coef
            )
            values = {name: value * share for name, value in values.items()}
        return values

    return get_loss


def _weight(matched: float, queries: int, empty: float) -> float:
    return matched + empty * (queries - matched)


def _of_rt_detr_loss(criterion: Any, counts: BoxCounts) -> Callable[..., dict[str, Tensor]]:
    """`get_loss` of RT-DETR's line: what it divides by are multiples of its own boxes.

    DEIMv2 divides by the pairs of a union of matches too. The DDF of D-FINE stays a mean of each process, as
    its authors have it.
    """
    own, share = criterion.get_loss, max(counts.mean, 1.0) / max(counts.own, 1.0)
    shares: dict[int, float] = {}  # of lists of indices that count otherwise

    if hasattr(criterion, "_get_dense_o2o_indices"):
        united = criterion._get_dense_o2o_indices

        def union(*matches: Any) -> Indices:
            found: Indices = united(*matches)
            pairs = torch.tensor(float(sum(len(queries) for queries, _ in found)))
            shares[id(found)] = max(float(mean(pairs)), 1.0) / max(float(pairs), 1.0)
            return found

        criterion._get_dense_o2o_indices = union

    def get_loss(loss: str, outputs: Any, targets: Any, indices: Indices, boxes: float) -> dict[str, Tensor]:
        divisor = boxes * shares.get(id(indices), share)
        values: dict[str, Tensor] = own(loss, outputs, targets, indices, divisor)
        return values

    return get_loss
