"""The teacher at work: it sees the student's batch, and what it says and computes becomes a lesson."""

from typing import Any

import torch
from torch import nn

from qdetr_cli.data import Batch
from qdetr_cli.families import Family, family_of
from qdetr_cli.features import recorded
from qdetr_cli.losses import predictions_of
from qdetr_cli.matching import Predictions, hungarian_pairs, object_pairs, same_query
from qdetr_cli.terms import Lesson


class Teacher:
    """A float detector in eval mode, without gradient.

    `same_origin` says that the student began as this model: then learned queries correspond one to one, and
    otherwise they are matched. Where its width differs from the student's, learned projections, of no use
    after training, take the student's features to its width.
    """

    def __init__(self, model: nn.Module, student: nn.Module, family: Family, *, same_origin: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self.family, self.own_family = family, family_of(model)
        self.same_query = same_origin and family.fixed_queries
        self.projections = _projections(student, model)

    def lesson(self, student: Predictions, batch: Batch) -> Lesson:
        """The lesson of one batch: what both say, in the teacher's width, and who is whose partner."""
        with torch.no_grad(), recorded(self.model, self.own_family) as features:
            outputs = self.model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
            mentor = predictions_of(outputs, features)
        softmax = self.family.softmax
        matched = (
            same_query(student) if self.same_query else hungarian_pairs(student, mentor, softmax=softmax)
        )
        return Lesson(
            student=self._projected(student),
            labels=batch.labels,
            softmax=softmax,
            mentor=mentor,
            pairs=object_pairs(matched, student, mentor, batch.labels, softmax=softmax),
        )

    def _projected(self, student: Predictions) -> Predictions:
        if not self.projections:
            return student
        wider: Any = self.projections
        return Predictions(
            logits=student.logits,
            boxes=student.boxes,
            co_attended=tuple(wider["co_attended"](each) for each in student.co_attended),
            memory=None if student.memory is None else wider["memory"](student.memory),
            memory_mask=student.memory_mask,
        )


def _projections(student: nn.Module, teacher: nn.Module) -> nn.ModuleDict:
    mine, theirs = _width(student), _width(teacher)
    if mine == theirs:
        return nn.ModuleDict()
    return nn.ModuleDict({name: nn.Linear(mine, theirs) for name in ("co_attended", "memory")})


def _width(model: Any) -> int:
    """The width of the decoder."""
    config = model.config
    return int(getattr(config, "d_model", None) or config.hidden_size)
