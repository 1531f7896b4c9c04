"""The teacher: who is whose partner, in whose width, and that it learns nothing itself."""

import copy
from functools import cache

import pytest
import torch
from tiny_detectors import tiny_config
from torch import nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.data import Batch
from qdetr_cli.families import family_of
from qdetr_cli.features import recorded
from qdetr_cli.losses import predictions_of
from qdetr_cli.matching import Predictions, object_queries
from qdetr_cli.recipe import Term
from qdetr_cli.teacher import Teacher
from qdetr_cli.terms import weighted

TERMS = {name: Term() for name in ("logits", "boxes", "foreground_queries", "co_attended", "memory")}


@cache
def _detector(name: str, changes: tuple[tuple[str, int], ...]) -> nn.Module:
    torch.manual_seed(0)
    model = load_config_model({**tiny_config(name), **dict(changes)}, None).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def detector(name: str, **changes: int) -> nn.Module:
    return copy.deepcopy(_detector(name, tuple(sorted(changes.items()))))


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    boxes = 0.2 + 0.3 * torch.rand(2, 4, generator=generator)
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": boxes},
        {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    return Batch(
        pixel_values=torch.rand(2, 3, 64, 96, generator=generator),
        pixel_mask=torch.ones(2, 64, 96, dtype=torch.int64),
        labels=labels,
        image_ids=[0, 1],
        sizes=torch.tensor([[64, 96]] * 2),
    )


def said(model: nn.Module) -> Predictions:
    """What a student says and computes on `batch()`."""
    with recorded(model, family_of(model)) as features:
        outputs = model(pixel_values=batch().pixel_values, pixel_mask=batch().pixel_mask)
    return predictions_of(outputs, features)


def permuted(model: nn.Module, order: list[int]) -> nn.Module:
    """The same DETR with its learned queries in another order."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        own = model.model.query_position_embeddings.weight
        other.model.query_position_embeddings.weight.copy_(own[order])
    return other


ORDER = [3, 6, 0, 5, 1, 4, 2]


def test_queries_of_one_origin_pair_by_index_but_where_an_object_is_in_another():
    student = detector("detr")
    teacher = Teacher(permuted(student, ORDER), student, family_of(student), same_origin=True)
    lesson = teacher.lesson(said(student), batch())
    assert lesson.pairs[1].tolist() == list(range(7))  # an image without objects
    (mine, _), (theirs, _) = (
        object_queries(each, lesson.labels, softmax=True) for each in (lesson.student, lesson.mentor)
    )
    assert lesson.pairs[0, mine[0]].tolist() == [ORDER.index(query) for query in mine[0].tolist()]
    others = set(range(7)) - {*mine[0].tolist(), *theirs[0].tolist()}
    assert others
    assert all(lesson.pairs[0, query] == query for query in others)


def test_queries_of_another_origin_are_matched():
    """Query i of the student is query ORDER.index(i) of the teacher, and says the same."""
    student = detector("detr")
    teacher = Teacher(permuted(student, ORDER), student, family_of(student), same_origin=False)
    lesson = teacher.lesson(said(student), batch())
    assert lesson.pairs.tolist() == [[ORDER.index(query) for query in range(7)]] * 2
    torch.testing.assert_close(lesson.partner.logits, lesson.student.logits.detach())
    torch.testing.assert_close(lesson.partner.co_attended[1], lesson.student.co_attended[1].detach())
    total, _ = weighted(TERMS, lesson, "distill")
    assert float(total.detach()) == pytest.approx(0.0, abs=1e-3)


def test_a_selection_of_queries_is_matched_whatever_its_origin():
    student = detector("rt_detr")
    teacher = Teacher(copy.deepcopy(student), student, family_of(student), same_origin=True)
    mine = said(student)
    order = torch.tensor([ORDER] * 2)
    lesson = teacher.lesson(mine.take(order), batch())
    assert lesson.pairs.tolist() == order.tolist()


def test_the_mentor_is_the_teacher_as_it_is_without_a_student():
    student, model = detector("detr"), detector("detr", num_queries=9)
    lesson = Teacher(model, student, family_of(student), same_origin=False).lesson(said(student), batch())
    expected = said(model)
    assert torch.equal(lesson.mentor.logits, expected.logits)
    assert torch.equal(lesson.mentor.memory, expected.memory)
    assert [len(each) for each in lesson.mentor.co_attended[0]] == [9, 9], "all of its queries"
    assert lesson.partner.logits.shape == lesson.student.logits.shape
    assert lesson.labels[0]["class_labels"].tolist() == [0, 2]
    assert lesson.softmax is True


def test_it_has_no_gradient_no_dropout_and_no_hooks_left():
    student = detector("detr").train()
    model = detector("detr").train()
    lesson = Teacher(model, student, family_of(student), same_origin=True).lesson(said(student), batch())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    given = (lesson.mentor.logits, lesson.mentor.memory, *lesson.mentor.co_attended)
    assert not any(each.requires_grad for each in given)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    weighted(TERMS, lesson, "distill")[0].backward()
    assert student.model.decoder.layers[0].encoder_attn.v_proj.weight.grad.any()


def test_of_the_same_width_nothing_is_projected():
    student = detector("detr")
    teacher = Teacher(detector("detr"), student, family_of(student), same_origin=True)
    assert list(teacher.projections.parameters()) == []
    mine = said(student)
    assert teacher.lesson(mine, batch()).student is mine


def test_a_wider_teacher_is_met_in_its_own_width():
    """Features and memory go through learned projections; what is predicted does not."""
    student, model = detector("detr"), detector("detr", d_model=32)
    teacher = Teacher(model, student, family_of(student), same_origin=False)
    mine = said(student)
    lesson = teacher.lesson(mine, batch())
    assert set(dict(teacher.projections)) == {"co_attended", "memory"}
    for index in (0, 1):
        expected = teacher.projections["co_attended"](mine.co_attended[index])
        assert torch.equal(lesson.student.co_attended[index], expected)
        assert expected.shape == lesson.mentor.co_attended[index].shape == (2, 7, 32)
    assert torch.equal(lesson.student.memory, teacher.projections["memory"](mine.memory))
    assert torch.equal(lesson.student.logits, mine.logits)
    assert torch.equal(lesson.student.boxes, mine.boxes)
    weighted(TERMS, lesson, "distill")[0].backward()
    assert all(parameter.grad.any() for parameter in teacher.projections.parameters())
    assert student.model.encoder.layers[0].self_attn.v_proj.weight.grad.any()


def test_a_teacher_of_another_family_is_watched_by_its_own_names():
    """RT-DETR's student, D-FINE's teacher: their deformable attentions have unlike class names."""
    student, model = detector("rt_detr"), detector("d_fine")
    teacher = Teacher(model, student, family_of(student), same_origin=False)
    lesson = teacher.lesson(said(student), batch())
    assert [each.shape for each in lesson.mentor.co_attended] == [(2, 7, 16)] * 2
    total, values = weighted(TERMS, lesson, "distill")
    assert all(bool(value.isfinite()) for value in values.values())
    assert min(float(values["distill_co_attended"]), float(values["distill_memory"])) > 0
    assert total.requires_grad
