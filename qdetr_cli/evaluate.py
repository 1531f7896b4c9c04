"""Evaluation: AP of a model on a split, and the ladder, which tells what each module group costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from qdetr_cli.data import Batch, DetectionData, ImageSet, collate
from qdetr_cli.families import Family, post_process
from qdetr_cli.metrics import Detections, Metrics, measure
from qdetr_cli.plan import Plan
from qdetr_cli.processes import from_first, gathered, rank, world
from qdetr_cli.rewrite import set_enabled

TOP_K = 100  # detections per image, as COCO counts
REST = "other modules"

Advance = Callable[[int], None]
RungKind = Literal["float", "cumulative", "alone", "left out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One line of the ladder: which groups are quantized, and the metrics then."""

    name: str
    kind: RungKind
    groups: tuple[str, ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a model is measured on: annotations, images, and the class of each model index.

    `class_index[label]` is the model's index of a data-set label.
    """

    data: DetectionData
    images: ImageSet
    class_index: tuple[int, ...]
    batch_size: int = 16
    workers: int = 0
    metrics: tuple[str, ...] = ()

    def batches(self) -> "DataLoader[Any]":
        """The batches of this process: of all images in order, every n-th batch with n processes.

        A batch holds the same images whatever n is, and so is padded alike.
        """
        order = range(len(self.images))
        whole = [list(order[start : start + self.batch_size]) for start in order[:: self.batch_size]]
        return DataLoader(
            self.images,
            batch_sampler=whole[rank() :: world()],
            num_workers=self.workers,
            collate_fn=collate,
        )

    def in_order(self, own: "list[list[Detections]]") -> list[Detections]:
        """The detections of all images in order, from those of each of this process's batches."""
        shares = gathered(own)
        rounds = max(len(share) for share in shares)
        batches = [share[turn] for turn in range(rounds) for share in shares if turn < len(share)]
        return [each for batch in batches for each in batch]

    def seen(self, turn: int) -> int:
        """How many images all processes together see with their batch number `turn`."""
        together = self.batch_size * world()
        return min(together, len(self.images) - turn * together)


def evaluate(
    model: nn.Module,
    family: Family,
    bench: Bench,
    *,
    device: torch.device,
    advance: Advance = lambda done: None,
) -> Metrics:
    """The metrics of `model` on the bench."""
    found = detect_all(model, family, bench, device=device, advance=advance)
    return from_first(lambda: measure(bench.data, found, bench.metrics))


def detect_all(
    model: nn.Module,
    family: Family,
    bench: Bench,
    *,
    device: torch.device,
    advance: Advance = lambda done: None,
) -> list[Detections]:
    """The detections of `model` on every image of the bench, in order."""
    found: list[list[Detections]] = []
    for turn, batch in enumerate(bench.batches()):
        found.append(detect(model, family, batch.to(device), bench.class_index))
        advance(bench.seen(turn))
    return bench.in_order(found)


@torch.no_grad()
def detect(model: nn.Module, family: Family, batch: Batch, class_index: Sequence[int]) -> list[Detections]:
    """The detections of one batch, on original pixels, with data-set labels; other classes are left out."""
    model.eval()
    outputs = model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
    label_of = {index: label for label, index in enumerate(class_index)}
    results = post_process(family, outputs, batch.sizes, top_k=TOP_K)
    return [
        _detections(image_id, scores, labels, boxes, label_of)
        for image_id, (scores, labels, boxes) in zip(batch.image_ids, results, strict=True)
    ]


def ladder(
    model: nn.Module,
    family: Family,
    plan: Plan,
    bench: Bench,
    *,
    device: torch.device,
    advance: Advance = lambda done: None,
) -> tuple[tuple[Rung, ...], list[Detections]]:
    """AP as module groups are quantized in turn, each alone, all but each; and what all together find.

    Groups are switched on the same weights, and each image is read once for all rungs. The float rung is this
    model with every quantizer off: after QAT those are the fine-tuned weights, not the float checkpoint's.
    """
    groups = ladder_groups(plan)
    rungs = list(_rungs(tuple(groups)))
    settings = sorted({on for _, _, on in rungs}, key=lambda on: (len(on), sorted(on)))
    own: dict[frozenset[str], list[list[Detections]]] = {on: [] for on in settings}
    for turn, batch in enumerate(bench.batches()):
        batch = batch.to(device)
        for on in settings:
            with only(model, groups, on):
                own[on].append(detect(model, family, batch, bench.class_index))
        advance(bench.seen(turn))
    found = {on: bench.in_order(each) for on, each in own.items()}
    measured = from_first(lambda: {on: measure(bench.data, each) for on, each in found.items()})
    climbed = tuple(
        Rung(name=name, kind=kind, groups=tuple(g for g in groups if g in on), metrics=measured[on])
        for name, kind, on in rungs
    )
    return climbed, found[frozenset(groups)]


def ladder_groups(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Module paths of each ladder group; quantized modules in no group form one of their own at the end."""
    grouped = {path for paths in plan.ladder.values() for path in paths}
    rest = tuple(m.path for m in plan.modules if m.path not in grouped and not m.is_float)
    groups = {name: paths for name, paths in plan.ladder.items() if paths}
    return groups | ({REST: rest} if rest else {})


@contextmanager
def only(model: nn.Module, groups: Mapping[str, tuple[str, ...]], on: frozenset[str]) -> Iterator[None]:
    """Quantize the groups of `on` and no other, for the duration of the block."""
    for name, paths in groups.items():
        set_enabled(model, paths, name in on)
    try:
        yield
    finally:
        set_enabled(model, None, True)


def _rungs(names: tuple[str, ...]) -> Iterator[tuple[str, RungKind, frozenset[str]]]:
    yield "float", "float", frozenset()
    for count, name in enumerate(names, start=1):
        yield f"+ {name}", "cumulative", frozenset(names[:count])
    for name in names:
        yield f"only {name}", "alone", frozenset({name})
    for name in names:
        yield f"all but {name}", "left out", frozenset(names) - {name}


def _detections(
    image_id: int,
    scores: torch.Tensor,
    labels: torch.Tensor,
    boxes: torch.Tensor,
    label_of: Mapping[int, int],
) -> Detections:
    mapped = np.array([label_of.get(int(label), -1) for label in labels], dtype=np.int64)
    known = mapped >= 0
    return Detections(
        image_id=image_id,
        boxes=boxes.double().cpu().numpy()[known],
        scores=scores.double().cpu().numpy()[known],
        labels=mapped[known],
    )
