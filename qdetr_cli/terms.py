"""Loss terms that a recipe weighs: what the student learns from a teacher, and IoU-aware classification.

A term is a function of a Lesson, with options of its own, and gives a scalar. `distill.terms` have a teacher;
`train.terms` have none. What a term divides by is a mean over the processes of a training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor
from torch.nn import functional

from qdetr_cli import plugins
from qdetr_cli.boxes import cxcywh_to_xyxy, giou, iou
from qdetr_cli.errors import RecipeError
from qdetr_cli.matching import (
    TAU,
    Labels,
    Predictions,
    foreground_queries,
    nearest_boxes,
    object_queries,
)
from qdetr_cli.processes import mean
from qdetr_cli.recipe import Term

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0  # DETR's box loss coefficients
BACKGROUND_WEIGHT = 0.1  # DETR's eos_coefficient: how much an empty query counts
FOCAL_GAMMA = 2.0
_TINY = 1e-6


@dataclass(frozen=True)
class Lesson:
    """One batch as the terms see it. Shape letters: B images, Q queries, C classes, D width, L tokens."""

    student: Predictions
    labels: Labels  # for each image `class_labels` (T,) and `boxes` (T, 4) cxcywh
    softmax: bool  # classes compete, the last logit is "no object"
    mentor: Predictions | None = None  # all of the teacher's queries, in its own order, without gradient
    pairs: Tensor | None = None  # (B, Q): for each student query the teacher's that stands for the same

    @property
    def teacher(self) -> Predictions:
        """What the teacher says. Raises RecipeError where there is none."""
        if self.mentor is None:
            raise RecipeError("this term needs a teacher: write it under distill.terms, not train.terms")
        return self.mentor

    @cached_property
    def partner(self) -> Predictions:
        """The teacher's predictions in the student's order: row q is the partner of query q."""
        assert self.pairs is not None or self.mentor is None
        return self.teacher if self.pairs is None else self.teacher.take(self.pairs)


LossTerm = Callable[..., Tensor]
Layers = Literal["last", "all"]  # decoder layers whose features are compared


def weighted(terms: dict[str, Term], lesson: Lesson, prefix: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of terms, and each unweighted and without gradient, as `<prefix>_<name>`."""
    values = {name: plugins.get("loss", name)(lesson, **term.options) for name, term in terms.items()}
    total = torch.stack([term.weight * values[name] for name, term in terms.items()]).sum()
    return total, {f"{prefix}_{name}": value.detach() for name, value in values.items()}


def check_terms(terms: dict[str, Term], where: str) -> None:
    """Raise PluginError for an unknown term, RecipeError for an option that it lacks or cannot take."""
    for name, term in terms.items():
        parameters = list(signature(plugins.get("loss", name)).parameters.values())[1:]
        takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
        known = [each.name for each in parameters]
        unknown = sorted(set(term.options) - set(known))
        if unknown and not takes_any:
            raise RecipeError(
                f"{where}.{name}: has no option {', '.join(unknown)}; options: {', '.join(known) or 'none'}"
            )
        hints = {each.name: each.annotation for each in parameters}
        for option, value in term.options.items():
            if not _fits(value, hints.get(option)):
                raise RecipeError(f"{where}.{name}.{option}: {value} is not {_kind(hints[option])}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether an option's value is what the term says it takes; what it does not say is its own affair."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str) else True


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[hint]


@plugins.register("loss", "logits")
def logits_term(lesson: Lesson) -> Tensor:
    """Distance of class distributions, a scalar; a query counts as much as the teacher sees an object there.

    Softmax families: KL(teacher || student). Sigmoid families: quality focal loss (Li et al., 2020, eq. 1)
    with the teacher's probability as the target.
    """
    weight = BACKGROUND_WEIGHT + foreground(lesson.partner, lesson.softmax)  # (B, Q)
    mine, theirs = lesson.student.logits.float(), lesson.partner.logits.float()
    if lesson.softmax:
        distance = functional.kl_div(
            mine.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
    else:
        distance = _quality_focal(mine, theirs.sigmoid()).sum(-1)
    average: Tensor = (weight * distance).sum() / mean(weight.sum())
    return average


@plugins.register("loss", "boxes")
def boxes_term(lesson: Lesson) -> Tensor:
    """DETR's box loss (5 L1 + 2 GIoU) against the teacher's boxes, weighted by its confidence; a scalar."""
    weight = foreground(lesson.partner, lesson.softmax)  # (B, Q)
    mine, theirs = lesson.student.boxes, lesson.partner.boxes
    l1 = (mine.float() - theirs.float()).abs().sum(-1)
    overlap = giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs))
    total: Tensor = (weight * (L1_WEIGHT * l1 + GIOU_WEIGHT * (1 - overlap))).sum()
    return total / mean(weight.sum()).clamp(min=_TINY)


@plugins.register("loss", "foreground_queries")
def foreground_queries_term(
    lesson: Lesson, *, tau: float = TAU, overlap: float = 2.0, distance: float = 5.0, layers: Layers = "last"
) -> Tensor:
    """Q-DETR's distillation loss: mean over kept pairs of ||D_teacher - D_student||_2, a scalar.

    Foreground-aware query matching says which queries are kept (`tau`) and who is whose partner (`overlap`
    and `distance`: mu1 and mu2). `layers`: the co-attended features of the last decoder layer, or of all.
    """
    student, teacher = lesson.student, lesson.teacher
    kept = foreground_queries(student.boxes, lesson.labels, tau=tau)  # (B, Q)
    pairs = nearest_boxes(student.boxes, teacher.boxes, overlap=overlap, distance=distance)
    partner = teacher.take(pairs)
    count = mean(kept.sum().float()).clamp(min=1)
    distances = [
        (kept * _norm(mine.float() - theirs.float())).sum() / count
        for mine, theirs in _layers(student, partner, layers)
    ]
    return torch.stack(distances).mean()


@plugins.register("loss", "co_attended")
def co_attended_term(lesson: Lesson, *, layers: Layers = "all") -> Tensor:
    """Squared error of co-attended features over their size, weighted by the teacher's confidence; a scalar.

    Pairs are the lesson's: query i with query i where student and teacher share their queries, so that no
    noise of matching arises; else Hungarian.
    """
    weight = BACKGROUND_WEIGHT + foreground(lesson.partner, lesson.softmax)  # (B, Q)
    errors = [
        _relative_error(mine, theirs, weight)
        for mine, theirs in _layers(lesson.student, lesson.partner, layers)
    ]
    return torch.stack(errors).mean()


@plugins.register("loss", "memory")
def memory_term(lesson: Lesson) -> Tensor:
    """Squared error of the encoder's memory over its size, a scalar; padding does not count.

    Both models see the same pixels.
    """
    mine, theirs = lesson.student.memory, lesson.teacher.memory
    if mine is None or theirs is None:
        raise RecipeError(
            "distill.terms.memory: this family has no memory that a decoder reads; drop the term"
        )
    if mine.shape[1] != theirs.shape[1]:
        raise RecipeError(
            f"distill.terms.memory: the student's memory has {mine.shape[1]} tokens and the teacher's "
            f"{theirs.shape[1]}; drop the term, or choose a teacher with the same strides"
        )
    mask = lesson.teacher.memory_mask
    seen = torch.ones(mine.shape[:2], dtype=torch.bool, device=mine.device) if mask is None else mask
    return _relative_error(mine, theirs, seen.float())


@plugins.register("loss", "iou_aware")
def iou_aware_term(lesson: Lesson) -> Tensor:
    """Classification with the IoU of a query's own box as the target of its object's class, a scalar.

    Rounding makes class and box disagree; a score that tells the overlap ranks detections by it
    (VarifocalNet, Zhang et al. 2021). One-to-one assignment as in DETR. Sigmoid families: quality focal loss,
    per object. Softmax families: cross entropy with the IoU on the class and the rest on "no object".
    """
    logits = lesson.student.logits.float()  # (B, Q, C)
    target, matched = _overlap_targets(lesson)
    if lesson.softmax:
        target[..., -1] = 1 - target[..., :-1].sum(-1)
        weight = torch.where(matched, 1.0, BACKGROUND_WEIGHT)
        loss = -(target * logits.log_softmax(-1)).sum(-1)
        return (weight * loss).sum() / mean(weight.sum())
    return _quality_focal(logits, target).sum() / mean(matched.sum().float()).clamp(min=1)


def _overlap_targets(lesson: Lesson) -> tuple[Tensor, Tensor]:
    """IoU (B, Q, C) of each matched query with its object, at the object's class; which match, (B, Q)."""
    student = lesson.student
    target = torch.zeros_like(student.logits, dtype=torch.float32)
    matched = torch.zeros(target.shape[:2], dtype=torch.bool, device=target.device)
    pairs = object_queries(student, lesson.labels, softmax=lesson.softmax)
    for image, (queries, objects) in enumerate(pairs):
        label = lesson.labels[image]
        mine = cxcywh_to_xyxy(student.boxes[image, queries].detach().float())
        theirs = cxcywh_to_xyxy(label["boxes"][objects].float())
        target[image, queries, label["class_labels"][objects]] = iou(mine, theirs)
        matched[image, queries] = True
    return target, matched


def foreground(predictions: Predictions, softmax: bool) -> Tensor:
    """How sure each query is of any object, 0..1, (B, Q), without gradient."""
    logits = predictions.logits.detach().float()
    scores = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    return scores.amax(-1)


def _quality_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Quality focal loss, elementwise (Li et al. 2020, eq. 1)."""
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return entropy * (logits.sigmoid() - target).abs().pow(FOCAL_GAMMA)


def _layers(student: Predictions, teacher: Predictions, which: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of co-attended features, counted from the last decoder layer: it exists in every model."""
    if which not in ("last", "all"):
        raise RecipeError(f"layers: {which} is not one of last, all")
    pairs = list(zip(reversed(student.co_attended), reversed(teacher.co_attended), strict=False))
    if not pairs:
        raise RecipeError("this term compares co-attended features of a decoder, and this family has none")
    return pairs[:1] if which == "last" else pairs


def _norm(x: Tensor) -> Tensor:
    """Euclidean length over the last dimension, with a finite gradient at 0."""
    return x.square().sum(-1).clamp(min=_TINY**2).sqrt()


def _relative_error(mine: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error of (B, L, D) over the weighted square of `theirs`, a scalar; weight (B, L)."""
    away = weight[..., None] == 0  # whatever padding holds: of an image that is all padding it is no number
    mine, theirs = (each.float().masked_fill(away, 0) for each in (mine, theirs))
    error = (weight * (mine - theirs).square().sum(-1)).sum()
    return error / mean((weight * theirs.square().sum(-1)).sum()).clamp(min=_TINY)
