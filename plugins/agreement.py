"""A distillation term: the student should be as sure as the teacher that a query holds an object at all.

distill: {teacher: float, terms: {logits: 1.0, boxes: 1.0, agreement: 0.5}}
plugins: [plugins]
"""

from torch import Tensor

from qdetr_cli.matching import Predictions
from qdetr_cli.plugins import register
from qdetr_cli.terms import Lesson


@register("loss", "agreement")
def agreement(lesson: Lesson) -> Tensor:
    """Return the mean squared difference of the best class score of paired queries, a scalar."""
    mine, theirs = _best(lesson.student, lesson.softmax), _best(lesson.partner, lesson.softmax)
    return (mine - theirs).square().mean()


def _best(predictions: Predictions, softmax: bool) -> Tensor:
    """Return the best score of each query, 0..1, (B, Q), without the "no object" of softmax families."""
    logits = predictions.logits.float()
    scores = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    return scores.amax(-1)
