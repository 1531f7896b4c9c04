"""The sample distillation term of `plugins/`, against values worked out by hand."""

from pathlib import Path

import pytest
import torch

from qdetr_cli import plugins
from qdetr_cli.matching import Predictions
from qdetr_cli.recipe import Term
from qdetr_cli.terms import Lesson, weighted

FOLDER = Path(__file__).parents[1] / "plugins"


@pytest.mark.parametrize(
    ("softmax", "expected"),
    [(False, (0.5 - 0.8807971) ** 2), (True, (0.5 - 0.8807971) ** 2)],
    ids=["sigmoid", "softmax"],
)
def test_agreement_by_hand(softmax, expected):
    """sigmoid(2) = 0.8808, and so is softmax of (2, 0) where the second is "no object".

    The teacher's queries stand in another order: the second is the student's partner.
    """
    plugins.load([FOLDER])
    boxes = torch.full((1, 2, 4), 0.5)
    student = Predictions(logits=torch.zeros(1, 1, 2), boxes=boxes[:, :1])
    mentor = Predictions(logits=torch.tensor([[[9.0, 0.0], [2.0, 0.0]]]), boxes=boxes)
    lesson = Lesson(student=student, labels=[], softmax=softmax, mentor=mentor, pairs=torch.tensor([[1]]))
    total, terms = weighted({"agreement": Term(weight=0.5)}, lesson, "distill")
    assert float(terms["distill_agreement"]) == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(0.5 * expected, rel=1e-5)
    own = Lesson(student=lesson.partner, labels=[], softmax=softmax, mentor=mentor, pairs=lesson.pairs)
    assert float(plugins.get("loss", "agreement")(own)) == 0.0
