"""The sample distillation term of `plugins/`, against values worked out by hand."""

from pathlib import Path

import pytest
import torch

from qdetr_cli import plugins
from qdetr_cli.matching import Predictions

FOLDER = Path(__file__).parents[1] / "plugins"


@pytest.mark.parametrize(
    ("softmax", "expected"),
    [(False, (0.5 - 0.8807971) ** 2), (True, (0.5 - 0.8807971) ** 2)],
    ids=["sigmoid", "softmax"],
)
def test_agreement_by_hand(softmax, expected):
    """sigmoid(2) = 0.8808, and so is softmax of (2, 0) where the second is "no object"."""
    plugins.load([FOLDER])
    boxes = torch.full((1, 1, 4), 0.5)
    student = Predictions(logits=torch.tensor([[[0.0, 0.0]]]), boxes=boxes)
    teacher = Predictions(logits=torch.tensor([[[2.0, 0.0]]]), boxes=boxes)
    term = plugins.get("loss", "agreement")
    assert float(term(student, teacher, softmax)) == pytest.approx(expected, rel=1e-5)
    assert float(term(teacher, teacher, softmax)) == 0.0
