"""Who is whose partner: against the equations written as loops, transformers' own matcher, and by hand."""

import pytest
import torch
from torchvision import ops
from transformers.loss.loss_for_object_detection import HungarianMatcher

from qdetr_cli.boxes import cxcywh_to_xyxy
from qdetr_cli.matching import (
    Predictions,
    foreground_queries,
    hungarian_pairs,
    nearest_boxes,
    object_pairs,
    object_queries,
    same_query,
)


def some_boxes(count: int, seed: int) -> torch.Tensor:
    """(count, 4) cxcywh, some of which overlap and some do not."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(count, 2, generator=generator)
    return torch.cat([centers, 0.05 + 0.35 * torch.rand(count, 2, generator=generator)], dim=1)


def labels(*boxes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"class_labels": torch.arange(len(each)) % 3, "boxes": each} for each in boxes]


def said(queries: int, seed: int = 0, classes: int = 4, batch: int = 2) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    return Predictions(
        logits=2 * torch.randn(batch, queries, classes, generator=generator),
        boxes=torch.stack([some_boxes(queries, 10 * seed + image) for image in range(batch)]),
        co_attended=(torch.randn(batch, queries, 6, generator=generator),),
        memory=torch.randn(batch, 9, 6, generator=generator),
    )


def near(boxes: torch.Tensor, count: int) -> torch.Tensor:
    """Objects near the first `count` boxes; of more than two, the last is beyond the reach of all."""
    moved = boxes[:count] + 0.04 * torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    moved = moved.clamp(min=0.02)
    moved[2:][-1:] += torch.tensor([3.0, 3.0, 0.0, 0.0])
    return moved


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """GIoU of two boxes (4,) cxcywh, by torchvision."""
    a, b = (cxcywh_to_xyxy(each)[None].double() for each in (one, other))
    return float(ops.generalized_box_iou(a, b))


def kept_by_loops(boxes: torch.Tensor, objects: torch.Tensor, tau: float) -> list[bool]:
    """METHOD 3, steps 1 and 2, for one image: one pair at a time."""
    kept = [False] * len(boxes)
    for target in objects:
        best = max(0.0, max(overlap(target, box) for box in boxes))
        for query, box in enumerate(boxes):
            if overlap(target, box) > tau * best:
                kept[query] = True
    return kept


def nearest_by_loops(student: torch.Tensor, teacher: torch.Tensor, mu: tuple[float, float]) -> list[int]:
    """METHOD 3, step 3, for one image: one pair at a time."""
    found = []
    for mine in student:
        scores = [mu[0] * overlap(mine, box) - mu[1] * float((mine - box).abs().sum()) for box in teacher]
        found.append(scores.index(max(scores)))
    return found


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("counts", [(3, 1), (1, 5), (2, 0), (0, 0)], ids=str)
def test_kept_queries_are_those_of_the_loops(counts, tau):
    boxes = torch.stack([some_boxes(12, 1), some_boxes(12, 2)])
    objects = [near(boxes[image], count) for image, count in enumerate(counts)]
    expected = [kept_by_loops(boxes[image], objects[image], tau) for image in range(2)]
    got = foreground_queries(boxes, labels(*objects), tau=tau)
    assert got.tolist() == expected
    if tau <= 0.6:
        assert [any(each) for each in expected] == [count > 0 for count in counts], "nothing to compare"


def test_images_do_not_share_their_objects():
    """Image 1 is judged by its own object alone, and the padding of its list is none."""
    boxes = torch.stack([some_boxes(12, 1), some_boxes(12, 2)])
    objects = [near(boxes[0], 6), near(boxes[1], 1)]
    together = foreground_queries(boxes, labels(*objects))
    alone = [foreground_queries(boxes[i : i + 1], labels(objects[i]))[0] for i in range(2)]
    assert torch.equal(together, torch.stack(alone))


def test_objects_that_no_query_reaches_keep_nobody():
    """All GIoUs are negative."""
    boxes = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.2, 0.1, 0.1, 0.1], [0.1, 0.3, 0.1, 0.1]]])
    objects = torch.tensor([[0.9, 0.9, 0.1, 0.1]])
    assert max(overlap(objects[0], box) for box in boxes[0]) < 0
    for tau in (0.0, 0.6, 1.0):
        assert not foreground_queries(boxes, labels(objects), tau=tau).any()


def test_kept_queries_by_hand():
    """The object covers 0..4 x 0..4 of tenths; parts of it have GIoU = IoU = 1, 3/4, 1/2 (hull = object)."""
    objects = torch.tensor([[0.2, 0.2, 0.4, 0.4]])
    boxes = torch.tensor([[[0.2, 0.2, 0.4, 0.4], [0.15, 0.2, 0.3, 0.4], [0.1, 0.2, 0.2, 0.4]]])
    for tau, expected in ((0.6, [1, 1, 0]), (0.4, [1, 1, 1]), (0.8, [1, 0, 0]), (1.0, [0, 0, 0])):
        assert foreground_queries(boxes, labels(objects), tau=tau)[0].tolist() == [bool(e) for e in expected]


@pytest.mark.parametrize("mu", [(2.0, 5.0), (0.0, 1.0), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("others", [12, 5, 20], ids=lambda count: f"{count} teacher queries")
def test_partners_are_those_of_the_loops(others, mu):
    student = torch.stack([some_boxes(12, 1), some_boxes(12, 2)])
    teacher = torch.stack([some_boxes(others, 3), some_boxes(others, 4)])
    expected = [nearest_by_loops(student[image], teacher[image], mu) for image in range(2)]
    got = nearest_boxes(student, teacher, overlap=mu[0], distance=mu[1])
    assert got.tolist() == expected
    if mu == (2.0, 5.0):
        assert torch.equal(nearest_boxes(student, teacher), got), "mu1 = 2 and mu2 = 5 are the defaults"


def test_two_students_may_have_one_partner():
    """An argmax, not an assignment: the second teacher stays without a student."""
    student = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2]]])
    teacher = torch.tensor([[[0.5, 0.5, 0.21, 0.2], [0.9, 0.9, 0.1, 0.1]]])
    assert nearest_boxes(student, teacher).tolist() == [[0, 0]]


def test_matching_takes_no_gradient():
    boxes = some_boxes(4, 0)[None].requires_grad_()
    assert not nearest_boxes(boxes, boxes).requires_grad
    assert not foreground_queries(boxes, labels(some_boxes(2, 1))).requires_grad


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (9, 1), (0, 0)], ids=str)
def test_object_queries_are_those_of_transformers(counts):
    """Its matcher with DETR's costs, where classes compete; (9, 1): more objects than queries."""
    student = said(6)
    objects = labels(*(some_boxes(count, 40 + count) for count in counts))
    matcher = HungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    expected = matcher({"logits": student.logits, "pred_boxes": student.boxes}, objects)
    got = object_queries(student, objects, softmax=True)
    assert len(got) == 2
    for (queries, matched), (wanted, partners) in zip(got, expected, strict=True):
        assert queries.tolist() == wanted.tolist()
        assert matched.tolist() == partners.tolist()


def test_object_queries_of_a_sigmoid_family_go_by_the_objects_own_class():
    """Same boxes everywhere: each object takes the query that is surest of its class."""
    logits = torch.full((1, 4, 3), -3.0)
    logits[0, 3, 0] = logits[0, 1, 2] = 3.0
    student = Predictions(logits=logits, boxes=torch.full((1, 4, 4), 0.5))
    objects = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.full((2, 4), 0.5)}]
    ((queries, matched),) = object_queries(student, objects, softmax=False)
    assert dict(zip(queries.tolist(), matched.tolist(), strict=True)) == {3: 0, 1: 1}


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sigmoid"])
def test_hungarian_pairs_undo_a_permutation(softmax):
    teacher = said(7)
    order = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    student = teacher.take(order)
    assert torch.equal(hungarian_pairs(student, teacher, softmax=softmax), order)
    torch.testing.assert_close(teacher.take(order).boxes, student.boxes)


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sigmoid"])
def test_hungarian_pairs_find_the_student_among_more_teachers(softmax):
    teacher = said(9)
    order = torch.tensor([[8, 0, 3, 5], [1, 7, 2, 6]])
    assert torch.equal(hungarian_pairs(teacher.take(order), teacher, softmax=softmax), order)


def test_take_reorders_everything_that_belongs_to_a_query():
    teacher, order = said(5), torch.tensor([[4, 4, 0], [1, 2, 3]])
    taken = teacher.take(order)
    for image in range(2):
        for row, query in enumerate(order[image].tolist()):
            assert torch.equal(taken.logits[image, row], teacher.logits[image, query])
            assert torch.equal(taken.boxes[image, row], teacher.boxes[image, query])
            assert torch.equal(taken.co_attended[0][image, row], teacher.co_attended[0][image, query])
    assert taken.memory is teacher.memory


def test_same_query_is_the_identity():
    teacher = said(5)
    torch.testing.assert_close(teacher.take(same_query(teacher)).logits, teacher.logits)


def one_image(*classes: int | None) -> Predictions:
    """Queries in one place, each sure of a class of 3, or of none."""
    logits = torch.full((1, len(classes), 3), -5.0)
    for query, each in enumerate(classes):
        if each is not None:
            logits[0, query, each] = 5.0
    return Predictions(logits=logits, boxes=torch.full((1, len(classes), 4), 0.5))


def objects_of(*classes: int) -> list[dict[str, torch.Tensor]]:
    boxes = torch.full((len(classes), 4), 0.5)
    return [{"class_labels": torch.tensor(classes, dtype=torch.int64), "boxes": boxes}]


@pytest.mark.parametrize(
    ("student", "teacher", "objects", "expected"),
    [
        pytest.param((0, None, None), (0, None, None), (0,), [0, 1, 2], id="they agree"),
        pytest.param((0, None, None), (None, None, 0), (0,), [2, 1, 0], id="in another query"),
        pytest.param((0, 1, None), (1, 0, None), (0, 1), [1, 0, 2], id="each in the other's query"),
        pytest.param((0, 1, None), (None, 0, 1), (0, 1), [1, 2, 0], id="a ring of three"),
        pytest.param((0, None, None), (None, None, 0), (), [0, 1, 2], id="no objects"),
        pytest.param((0, 1), (1, 0), (0, 1, 2), [1, 0], id="more objects than queries"),
    ],
)
def test_the_partner_of_an_objects_query_is_the_teachers_query_of_that_object(
    student, teacher, objects, expected
):
    mine, theirs = one_image(*student), one_image(*teacher)
    pairs = object_pairs(same_query(mine), mine, theirs, objects_of(*objects), softmax=False)
    assert pairs.tolist() == [expected]


def test_of_more_teachers_one_that_nobody_had_may_be_the_partner():
    mine, theirs = one_image(0, None), one_image(None, None, None, 0)
    pairs = object_pairs(torch.tensor([[2, 1]]), mine, theirs, objects_of(0), softmax=False)
    assert pairs.tolist() == [[3, 1]]


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sigmoid"])
def test_partners_stay_one_to_one_and_all_but_two_of_each_object_keep_theirs(softmax):
    student, teacher = said(7, seed=1), said(7, seed=2)
    known = labels(some_boxes(2, 5), some_boxes(3, 6))
    pairs = object_pairs(same_query(student), student, teacher, known, softmax=softmax)
    mine, theirs = (object_queries(each, known, softmax=softmax) for each in (student, teacher))
    for image, row in enumerate(pairs.tolist()):
        assert sorted(row) == list(range(7))
        wanted = dict(zip(theirs[image][1].tolist(), theirs[image][0].tolist(), strict=True))
        for query, item in zip(mine[image][0].tolist(), mine[image][1].tolist(), strict=True):
            assert row[query] == wanted[item]
        touched = {*mine[image][0].tolist(), *theirs[image][0].tolist()}
        assert all(row[query] == query for query in set(range(7)) - touched)


def test_what_is_no_number_is_matched_last():
    """A training that diverges is told so by its loss, not by a matcher that fails."""
    teacher = one_image(None, 1, 0)
    student = one_image(0, 1, None)
    student.logits[0, 0] = float("nan")
    student.boxes[0, 2] = float("inf")
    assert object_queries(student, objects_of(1), softmax=False)[0][0].tolist() == [1]
    assert sorted(hungarian_pairs(student, teacher, softmax=False)[0].tolist()) == [0, 1, 2]
    pairs = object_pairs(same_query(student), student, teacher, objects_of(1, 0, 2), softmax=False)
    assert sorted(pairs[0].tolist()) == [0, 1, 2]
