"""What a training minimises: the detection loss, the recipe's terms and auxiliary queries; its gradients."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from qdetr_cli.data import Batch
from qdetr_cli.families import Family
from qdetr_cli.losses import detection_loss
from qdetr_cli.one_to_many import AuxiliaryQueries
from qdetr_cli.recipe import Distill, Train
from qdetr_cli.teacher import Teacher
from qdetr_cli.terms import Lesson, weighted


class Objective:
    """The loss of a model on a batch. `extras` is learned beside the model, and of no use after training."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        train: Train,
        distill: Distill,
        *,
        teacher: nn.Module | None,
        same_origin: bool,
    ) -> None:
        self.model, self.family, self.train, self.distill = model, family, train, distill
        self.extras = nn.ModuleDict()
        self.strength = 1.0  # of the teacher's terms
        self.teacher: Teacher | None = None
        if teacher is not None and distill.terms:
            self.teacher = Teacher(teacher, model, family, same_origin=same_origin)
            if self.teacher.projections:
                self.extras["projections"] = self.teacher.projections
        self.queries: AuxiliaryQueries | None = None
        if train.one_to_many is not None:
            self.queries = self.extras["queries"] = AuxiliaryQueries(model, family, train.one_to_many)

    def enter(self, done: float) -> None:
        """Be what the recipe says for the fraction `done` of the steps."""
        if self.distill.fade is not None:
            self.strength = max(0.0, 1.0 - done / self.distill.fade)

    def __call__(self, wrapped: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each of its terms unweighted; `wrapped` is the model, or DDP around it."""
        with self._listening() as call:
            found = detection_loss(wrapped, self.family, batch, auxiliary=self.train.auxiliary)
        total, terms = found.total, found.terms
        if self.train.terms:
            lesson = Lesson(student=found.predictions, labels=batch.labels, softmax=self.family.softmax)
            extra, values = weighted(self.train.terms, lesson, "train")
            total, terms = total + extra, terms | values
        if self.teacher is not None and self.strength:
            lesson = self.teacher.lesson(found.predictions, batch)
            extra, values = weighted(self.distill.terms, lesson, "distill")
            total, terms = total + self.strength * extra, terms | values
        if self.queries is not None:
            many = self.queries.loss(self.model, call, batch.labels, auxiliary=self.train.auxiliary)
            total, terms = total + self.queries.spec.weight * many, terms | {"one_to_many": many.detach()}
        return total, terms

    def _listening(self) -> AbstractContextManager[dict[str, Any]]:
        """What the decoder is called with is kept, where auxiliary queries will call it again."""
        return nullcontext({}) if self.queries is None else self.queries.listening(self.model)


def clipped(parameters: Iterable[nn.Parameter], limit: float) -> bool:
    """Whether the gradients are finite, and then they are clipped to the norm `limit` (0: not at all).

    Finite gradients whose squares are not are divided by the largest value first. Untrained models of many
    layers have such: a layer norm of nearly equal features multiplies by 300.
    """
    learned = [each for each in parameters if each.grad is not None]
    gradients = [each.grad for each in learned if each.grad is not None]
    norm = get_total_norm(gradients)
    if not torch.isfinite(norm):
        largest = get_total_norm(gradients, norm_type=math.inf)
        if not torch.isfinite(largest):
            return False
        for gradient in gradients:
            gradient.div_(largest)
        norm = get_total_norm(gradients)
    clip_grads_with_norm_(learned, limit or math.inf, norm)
    return True
