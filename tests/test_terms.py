"""Loss terms of recipes: by hand, one image and one query at a time, and their gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torchvision import ops

from qdetr_cli import plugins
from qdetr_cli.boxes import cxcywh_to_xyxy
from qdetr_cli.errors import PluginError, RecipeError
from qdetr_cli.matching import Predictions, foreground_queries, nearest_boxes
from qdetr_cli.recipe import Term
from qdetr_cli.terms import (
    Lesson,
    boxes_term,
    check_terms,
    co_attended_term,
    foreground_queries_term,
    iou_aware_term,
    logits_term,
    memory_term,
    weighted,
)

TAUGHT = ("logits", "boxes", "foreground_queries", "co_attended", "memory")
BOTH = pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sigmoid"])


def said(seed: int, *, batch: int = 3, queries: int = 6, layers: int = 2, width: int = 5) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    centers = 0.2 + 0.6 * torch.rand(batch, queries, 2, generator=generator)
    sizes = 0.1 + 0.3 * torch.rand(batch, queries, 2, generator=generator)
    return Predictions(
        logits=2 * torch.randn(batch, queries, 4, generator=generator),
        boxes=torch.cat([centers, sizes], dim=-1),
        co_attended=tuple(torch.randn(batch, queries, width, generator=generator) for _ in range(layers)),
        memory=torch.randn(batch, 7, width, generator=generator),
    )


def objects_of(boxes: torch.Tensor, counts: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Objects near the first queries of each image."""
    return [
        {"class_labels": torch.arange(count) % 3, "boxes": boxes[image, :count].detach() * 0.9 + 0.02}
        for image, count in enumerate(counts)
    ]


def lesson(
    softmax: bool = True, counts: tuple[int, ...] = (2, 0, 1), queries: int = 6, layers: int = 2
) -> Lesson:
    """A lesson of two unlike models; the teacher has `queries` queries and as many layers as stated."""
    student, mentor = said(1), said(2, queries=queries, layers=layers)
    generator = torch.Generator().manual_seed(4)
    pairs = torch.stack([torch.randperm(queries, generator=generator)[:6] for _ in range(3)])
    return Lesson(
        student=student,
        labels=objects_of(student.boxes, counts),
        softmax=softmax,
        mentor=mentor,
        pairs=pairs,
    )


def of_oneself(softmax: bool) -> Lesson:
    mentor = said(2)
    pairs = torch.arange(6).expand(3, 6)
    return Lesson(
        student=mentor,
        labels=objects_of(mentor.boxes, (2, 0, 1)),
        softmax=softmax,
        mentor=mentor,
        pairs=pairs,
    )


def requiring_gradients(given: Lesson) -> tuple[Lesson, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The lesson on leaves, and the leaves of student and teacher."""

    def leaves(x: Predictions) -> dict[str, torch.Tensor]:
        found = {"logits": x.logits, "boxes": x.boxes, "memory": x.memory}
        found |= {f"layer {index}": each for index, each in enumerate(x.co_attended)}
        return {name: each.clone().requires_grad_() for name, each in found.items()}

    def joined(of: dict[str, torch.Tensor]) -> Predictions:
        layers = tuple(each for name, each in of.items() if name.startswith("layer"))
        return Predictions(logits=of["logits"], boxes=of["boxes"], memory=of["memory"], co_attended=layers)

    assert given.mentor is not None
    mine, theirs = leaves(given.student), leaves(given.mentor)
    return replace(given, student=joined(mine), mentor=joined(theirs)), mine, theirs


@BOTH
@pytest.mark.parametrize("name", TAUGHT)
def test_a_student_that_says_the_same_has_nothing_to_learn(name, softmax):
    """Quality focal loss is 0 there too, for it is weighted by the distance from its target."""
    assert float(plugins.get("loss", name)(of_oneself(softmax))) == pytest.approx(0.0, abs=1e-6)
    assert float(plugins.get("loss", name)(lesson(softmax))) > 0.01


@BOTH
@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("logits", {"logits"}),
        ("boxes", {"boxes"}),
        ("foreground_queries", {"layer 1"}),
        ("co_attended", {"layer 0", "layer 1"}),
        ("memory", {"memory"}),
        ("iou_aware", {"logits"}),
    ],
)
def test_gradients_reach_what_a_term_is_about_and_nothing_else(name, moved, softmax):
    given, mine, _ = requiring_gradients(lesson(softmax))
    plugins.get("loss", name)(replace(given, mentor=lesson(softmax).mentor)).backward()
    assert {key for key, each in mine.items() if each.grad is not None and each.grad.any()} == moved
    assert all(each.grad is None or bool(each.grad.isfinite().all()) for each in mine.values())


@pytest.mark.parametrize("name", TAUGHT)
def test_gradients_stay_finite_where_student_and_teacher_agree(name):
    given, mine, _ = requiring_gradients(of_oneself(True))
    plugins.get("loss", name)(given).backward()
    assert all(each.grad is None or bool(each.grad.isfinite().all()) for each in mine.values())


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "sigmoid"])
def test_logits_and_boxes_by_loops(softmax):
    """Weighted means over queries: by 0.1 + the teacher's confidence for classes, by that alone for boxes."""
    given = lesson(softmax, queries=8)
    student, mentor = given.student, given.mentor
    sums = {"class": 0.0, "box": 0.0}
    weights = {"class": 0.0, "box": 0.0}
    for image in range(3):
        for query in range(6):
            partner = int(given.pairs[image, query])
            mine, theirs = student.logits[image, query], mentor.logits[image, partner]
            if softmax:
                p, q = theirs.softmax(0), mine.softmax(0)
                sure = float(p[:-1].max())
                distance = sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
            else:
                p, q = theirs.sigmoid(), mine.sigmoid()
                sure = float(p.max())
                distance = sum(
                    float(-(t * s.log() + (1 - t) * (1 - s).log()) * (s - t).abs() ** 2)
                    for t, s in zip(p, q, strict=True)
                )
            mine, theirs = student.boxes[image, query], mentor.boxes[image, partner]
            overlap = ops.generalized_box_iou(cxcywh_to_xyxy(mine)[None], cxcywh_to_xyxy(theirs)[None])
            apart = 5 * float((mine - theirs).abs().sum()) + 2 * (1 - float(overlap))
            sums["class"] += (0.1 + sure) * distance
            weights["class"] += 0.1 + sure
            sums["box"] += sure * apart
            weights["box"] += sure
    assert float(logits_term(given)) == pytest.approx(sums["class"] / weights["class"], rel=1e-4)
    assert float(boxes_term(given)) == pytest.approx(sums["box"] / weights["box"], rel=1e-4)


def one_query(logits: list[float], box: list[float]) -> Predictions:
    return Predictions(logits=torch.tensor([[logits]]), boxes=torch.tensor([[box]]))


def pair_of(student: Predictions, mentor: Predictions, softmax: bool) -> Lesson:
    pairs = torch.zeros(1, 1, dtype=torch.int64)
    return Lesson(student=student, labels=[], softmax=softmax, mentor=mentor, pairs=pairs)


def test_logits_term_by_hand():
    """One query, one class: the weight cancels, quality focal loss is |p - t|^2 * cross entropy."""
    middle = [0.5, 0.5, 0.5, 0.5]
    target = 1 / (1 + math.exp(-2.0))
    given = pair_of(one_query([0.0], middle), one_query([2.0], middle), False)
    assert float(logits_term(given)) == pytest.approx((0.5 - target) ** 2 * math.log(2), rel=1e-5)


def test_boxes_term_by_hand():
    """L1 is 0.2 of width; IoU and GIoU are 1/2."""
    student, mentor = (one_query([0.0, 0.0], [0.5, 0.5, width, 0.2]) for width in (0.2, 0.4))
    assert float(boxes_term(pair_of(student, mentor, True))) == pytest.approx(5 * 0.2 + 2 * 0.5, rel=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("queries", [6, 9], ids=lambda count: f"{count} teacher queries")
def test_foreground_queries_by_loops(queries, layers, tau):
    """METHOD 3, step 4: the mean over kept pairs of the whole batch, image by image and query by query."""
    given = lesson(queries=queries)
    kept = foreground_queries(given.student.boxes, given.labels, tau=tau)
    partners = nearest_boxes(given.student.boxes, given.mentor.boxes)
    means = []
    for layer in range(2):
        mine, theirs = given.student.co_attended[layer], given.mentor.co_attended[layer]
        distances = [
            math.dist(mine[image, query].tolist(), theirs[image, int(partners[image, query])].tolist())
            for image in range(3)
            for query in range(6)
            if kept[image, query]
        ]
        means.append(sum(distances) / len(distances))
    expected = means[-1] if layers == "last" else sum(means) / 2
    assert 1 < int(kept.sum()) < 18
    assert float(foreground_queries_term(given, tau=tau, layers=layers)) == pytest.approx(expected, rel=1e-5)


def test_foreground_queries_by_hand():
    """Two queries on the object, a third far away; partners by box; distances 5 and 13."""
    boxes = [[0.2, 0.2, 0.4, 0.4], [0.15, 0.2, 0.3, 0.4], [0.9, 0.9, 0.1, 0.1]]
    student = Predictions(
        logits=torch.zeros(1, 3, 2),
        boxes=torch.tensor([boxes]),
        co_attended=(torch.zeros(1, 3, 2),),
    )
    mentor = Predictions(
        logits=torch.zeros(1, 3, 2),
        boxes=torch.tensor([boxes[::-1]]),
        co_attended=(torch.tensor([[[100.0, 0.0], [5.0, 12.0], [3.0, 4.0]]]),),
    )
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.2, 0.2, 0.4, 0.4]])}]
    given = Lesson(student=student, labels=labels, softmax=True, mentor=mentor)
    assert float(foreground_queries_term(given)) == pytest.approx((5 + 13) / 2)
    assert float(foreground_queries_term(given, tau=0.9)) == pytest.approx(5.0)


def test_foreground_queries_weigh_boxes_as_told():
    """With distance alone the nearer center wins; with overlap alone the box around it."""
    student = Predictions(
        logits=torch.zeros(1, 1, 2),
        boxes=torch.tensor([[[0.5, 0.5, 0.1, 0.1]]]),
        co_attended=(torch.zeros(1, 1, 1),),
    )
    mentor = Predictions(
        logits=torch.zeros(1, 2, 2),
        boxes=torch.tensor([[[0.5, 0.5, 0.3, 0.3], [0.59, 0.59, 0.1, 0.1]]]),
        co_attended=(torch.tensor([[[1.0], [2.0]]]),),
    )
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]])}]
    given = Lesson(student=student, labels=labels, softmax=True, mentor=mentor)
    assert float(foreground_queries_term(given, overlap=1.0, distance=0.0)) == pytest.approx(1.0)
    assert float(foreground_queries_term(given, overlap=0.0, distance=1.0)) == pytest.approx(2.0)


def test_without_objects_nothing_is_imitated():
    given, mine, _ = requiring_gradients(lesson(counts=(0, 0, 0)))
    value = foreground_queries_term(given)
    value.backward()
    assert float(value.detach()) == 0.0
    assert not mine["layer 1"].grad.any()


def test_matching_goes_by_the_mentors_own_order_not_by_the_lessons_pairs():
    given = lesson()
    other = replace(given, pairs=given.pairs.flip(1))
    assert float(foreground_queries_term(given)) == float(foreground_queries_term(other))
    assert float(co_attended_term(given)) != float(co_attended_term(other))


@pytest.mark.parametrize("layers", ["last", "all"])
def test_co_attended_by_loops(layers):
    """Squared error over the square of the teacher's feature, both weighted by 0.1 + its confidence."""
    given = lesson(queries=8)
    errors = []
    for layer in range(2):
        error = size = 0.0
        for image in range(3):
            for query in range(6):
                partner = int(given.pairs[image, query])
                sure = float(given.mentor.logits[image, partner].softmax(0)[:-1].max())
                mine = given.student.co_attended[layer][image, query]
                theirs = given.mentor.co_attended[layer][image, partner]
                error += (0.1 + sure) * float((mine - theirs).pow(2).sum())
                size += (0.1 + sure) * float(theirs.pow(2).sum())
        errors.append(error / size)
    expected = errors[-1] if layers == "last" else sum(errors) / 2
    assert float(co_attended_term(given, layers=layers)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("term", [co_attended_term, foreground_queries_term], ids=lambda term: term.__name__)
def test_a_teacher_with_more_layers_is_compared_from_the_last(term):
    """The last exists in every model: of 3 teacher layers the first is left out."""
    given = lesson(layers=3)
    shorter = replace(given, mentor=replace(given.mentor, co_attended=given.mentor.co_attended[1:]))
    assert float(term(given, layers="all")) == float(term(shorter, layers="all"))
    assert float(term(given, layers="last")) == float(term(shorter, layers="last"))


def test_memory_by_hand():
    student = replace(said(1), memory=torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]))
    mentor = replace(said(1), memory=torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]))
    given = Lesson(student=student, labels=[], softmax=True, mentor=mentor)
    assert float(memory_term(given)) == pytest.approx((4 + 8) / (1 + 8))


def test_padding_in_memory_does_not_count():
    student = replace(said(1), memory=torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]))
    mentor = replace(
        said(1),
        memory=torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]),
        memory_mask=torch.tensor([[True, False]]),
    )
    given = Lesson(student=student, labels=[], softmax=True, mentor=mentor)
    assert float(memory_term(given)) == pytest.approx(4 / 1)


@BOTH
@pytest.mark.parametrize("name", ["logits", "boxes", "co_attended"])
def test_weights_are_the_teachers_confidence(name, softmax):
    """Where the teacher sees nothing in one of two queries, an error there counts (almost) nothing."""
    nothing = torch.tensor([-9.0, -9.0, -9.0, 9.0]) if softmax else torch.full((4,), -9.0)
    sure = torch.tensor([9.0, -9.0, -9.0, -9.0])
    base = said(1, batch=1, queries=2)
    mentor = replace(base, logits=torch.stack([sure, nothing])[None])
    values = []
    for query in (0, 1):
        logits, boxes, layers = mentor.logits.clone(), mentor.boxes.clone(), mentor.co_attended[0].clone()
        logits[0, query, 1] += 6.0
        boxes[0, query, 0] += 0.1
        layers[0, query] += 3.0
        student = replace(mentor, logits=logits, boxes=boxes, co_attended=(layers,))
        short = replace(mentor, co_attended=mentor.co_attended[:1])
        pairs = torch.tensor([[0, 1]])
        given = Lesson(student=student, labels=[], softmax=softmax, mentor=short, pairs=pairs)
        values.append(float(plugins.get("loss", name)(given)))
    assert 0 <= values[1] < values[0]


# --- IoU-aware classification ---


def shifted(logits: list[list[float]], widths: list[float]) -> Predictions:
    """Queries with boxes that begin at the object's left edge, `widths` wide; the object is 0.4 wide."""
    boxes = [[0.2 + width / 2, 0.5, width, 0.2] for width in widths]
    return Predictions(logits=torch.tensor([logits]), boxes=torch.tensor([boxes]))


OBJECT = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.4, 0.2]])}]
NOTHING = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]


def test_iou_aware_by_hand_sigmoid():
    """The first query is matched (IoU 0.3 / 0.4); its class has that target, all else has 0."""
    logits = [[0.5, 1.0], [-1.0, -2.0]]
    given = Lesson(student=shifted(logits, [0.3, 0.1]), labels=OBJECT, softmax=False)
    expected = 0.0
    for row, targets in zip(logits, ([0.0, 0.75], [0.0, 0.0]), strict=True):
        for logit, target in zip(row, targets, strict=True):
            p = 1 / (1 + math.exp(-logit))
            entropy = -(target * math.log(p) + (1 - target) * math.log(1 - p))
            expected += entropy * (p - target) ** 2
    assert float(iou_aware_term(given)) == pytest.approx(expected, rel=1e-5)


def test_iou_aware_by_hand_softmax():
    """Cross entropy with 0.75 on the class and 0.25 on "no object"; the empty query counts a tenth."""
    logits = [[0.5, 1.0, 0.2], [-1.0, -2.0, 0.5]]
    given = Lesson(student=shifted(logits, [0.3, 0.1]), labels=OBJECT, softmax=True)
    (_, yes, none), (_, _, empty) = torch.tensor(logits).log_softmax(-1).tolist()
    expected = (-(0.75 * yes + 0.25 * none) - 0.1 * empty) / 1.1
    assert float(iou_aware_term(given)) == pytest.approx(expected, rel=1e-5)


def test_the_target_is_the_iou_not_the_giou():
    """Two crossing bars: IoU 1/3, but GIoU is 0.111 since they leave four corners of their hull free."""
    student = Predictions(logits=torch.zeros(1, 1, 1), boxes=torch.tensor([[[0.4, 0.4, 0.1, 0.2]]]))
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.4, 0.4, 0.2, 0.1]])}]
    iou = float(
        ops.box_iou(cxcywh_to_xyxy(student.boxes[0]).double(), cxcywh_to_xyxy(labels[0]["boxes"]).double())
    )
    assert iou == pytest.approx(1 / 3, rel=1e-5)
    expected = math.log(2) * (0.5 - iou) ** 2
    given = Lesson(student=student, labels=labels, softmax=False)
    assert float(iou_aware_term(given)) == pytest.approx(expected, rel=1e-4)


def test_a_box_that_misses_its_object_has_the_target_0():
    given = Lesson(
        student=one_query([0.0], [0.9, 0.9, 0.1, 0.1]),
        labels=[{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.1, 0.1, 0.1, 0.1]])}],
        softmax=False,
    )
    assert float(iou_aware_term(given)) == pytest.approx(math.log(2) * 0.25, rel=1e-5)


@BOTH
def test_images_without_objects_teach_that_there_are_none(softmax):
    logits = torch.tensor([[[0.3, -0.4, 0.1]]]).requires_grad_()
    student = Predictions(logits=logits, boxes=torch.full((1, 1, 4), 0.5))
    value = iou_aware_term(Lesson(student=student, labels=NOTHING, softmax=softmax))
    value.backward()
    if softmax:
        torch.testing.assert_close(value, -logits.log_softmax(-1)[0, 0, -1])
        assert float(logits.grad[0, 0, -1]) < 0 < float(logits.grad[0, 0, 0])
    else:
        p = logits.sigmoid()
        torch.testing.assert_close(value, (-(1 - p).log() * p**2).sum())
        assert bool((logits.grad > 0).all())


@BOTH
def test_iou_aware_of_a_batch_is_that_of_its_images(softmax):
    """Sigmoid: sums over images, over all objects. Softmax: the weighted mean over all queries."""
    student = said(1)
    labels = objects_of(student.boxes, (2, 0, 1))
    whole = iou_aware_term(Lesson(student=student, labels=labels, softmax=softmax))
    parts, weights = [], []
    for image, objects in enumerate((2, 0, 1)):
        alone = Predictions(logits=student.logits[image : image + 1], boxes=student.boxes[image : image + 1])
        value = float(
            iou_aware_term(Lesson(student=alone, labels=labels[image : image + 1], softmax=softmax))
        )
        weight = objects + 0.1 * (6 - objects) if softmax else max(objects, 1)
        parts.append(value * weight)
        weights.append(weight if softmax else objects)
    assert float(whole) == pytest.approx(sum(parts) / sum(weights), rel=1e-5)


# --- what a recipe can get wrong ---


@pytest.mark.parametrize("name", TAUGHT)
def test_a_term_without_its_teacher_says_where_it_belongs(name):
    student = said(1)
    alone = Lesson(student=student, labels=objects_of(student.boxes, (1, 1, 1)), softmax=True)
    with pytest.raises(RecipeError, match=r"needs a teacher: write it under distill\.terms"):
        plugins.get("loss", name)(alone)


@pytest.mark.parametrize("term", [co_attended_term, foreground_queries_term], ids=lambda term: term.__name__)
def test_layers_that_do_not_exist_are_refused(term):
    with pytest.raises(RecipeError, match="layers: first is not one of last, all"):
        term(lesson(), layers="first")
    bare = replace(lesson(), student=replace(said(1), co_attended=()))
    with pytest.raises(RecipeError, match="this family has none"):
        term(bare)


def test_memories_that_cannot_be_compared_are_refused():
    given = lesson()
    none = replace(given, student=replace(given.student, memory=None))
    with pytest.raises(RecipeError, match=r"distill\.terms\.memory: this family has no memory"):
        memory_term(none)
    short = replace(given, student=replace(given.student, memory=given.student.memory[:, :5]))
    with pytest.raises(RecipeError, match="has 5 tokens and the teacher's 7"):
        memory_term(short)


def test_an_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(
        RecipeError,
        match=r"terms\.foreground_queries: has no option tua; options: tau, overlap, distance, layers",
    ):
        check_terms({"foreground_queries": Term(weight=1.0, options={"tua": 0.6})}, "distill.terms")
    with pytest.raises(RecipeError, match=r"train\.terms\.iou_aware: has no option gamma; options: none"):
        check_terms({"iou_aware": Term(options={"gamma": 2.0})}, "train.terms")
    check_terms({"foreground_queries": Term(options={"tau": 0.5, "layers": "all"})}, "distill.terms")


def test_a_plugin_that_takes_any_option_is_given_it(monkeypatch):
    def anything(lesson: Lesson, **options):
        return torch.tensor(float(options["gain"]))

    entry = replace(next(e for e in plugins.entries() if e.name == "logits"), name="any", object=anything)
    monkeypatch.setattr(plugins, "get", lambda kind, name: entry.object)
    check_terms({"any": Term(options={"gain": 3.0})}, "distill.terms")
    total, _ = weighted({"any": Term(weight=2.0, options={"gain": 3.0})}, lesson(), "distill")
    assert float(total) == 6.0


def test_an_unknown_term_is_named():
    with pytest.raises(PluginError, match="logit"):
        check_terms({"logit": Term()}, "distill.terms")


def test_terms_are_weighed_and_told_unweighted():
    given = lesson()
    terms = {"logits": Term(weight=0.5), "foreground_queries": Term(weight=2.0, options={"tau": 0.0})}
    total, values = weighted(terms, given, "distill")
    assert set(values) == {"distill_logits", "distill_foreground_queries"}
    assert float(values["distill_logits"]) == pytest.approx(float(logits_term(given)))
    assert float(values["distill_foreground_queries"]) == pytest.approx(
        float(foreground_queries_term(given, tau=0.0))
    )
    assert float(foreground_queries_term(given, tau=0.0)) != float(foreground_queries_term(given))
    expected = 0.5 * values["distill_logits"] + 2.0 * values["distill_foreground_queries"]
    torch.testing.assert_close(total, expected)
    assert not any(value.requires_grad for value in values.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": "much"}, r"foreground_queries\.tau: much is not a number"),
        ({"overlap": True}, r"foreground_queries\.overlap: True is not a number"),
        ({"layers": "first"}, r"foreground_queries\.layers: first is not one of last, all"),
    ],
    ids=str,
)
def test_an_option_that_a_term_cannot_take_is_named_before_training(options, message):
    with pytest.raises(RecipeError, match=message):
        check_terms({"foreground_queries": Term(options=options)}, "distill.terms")
    check_terms({"foreground_queries": Term(options={"tau": 1, "layers": "last"})}, "distill.terms")
