"""Which query is the partner of which: student and teacher, or query and object.

Shape letters: B images, Q queries of the student, K of the teacher, C classes, T objects, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from qdetr_cli.boxes import cxcywh_to_xyxy, giou

CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0  # DETR's matching weights; boxes are cxcywh in 0..1
TAU = 0.6  # Q-DETR's threshold on a query's GIoU, as a part of the best query's
_DEAR = 1e6  # the cost of what is no number: far above any sum of the others
Labels = Sequence[dict[str, Tensor]]  # for each image `class_labels` (T,) and `boxes` (T, 4) cxcywh


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What a detector says of a batch: logits (B, Q, C) and boxes (B, Q, 4), cxcywh in 0..1.

    Where they were recorded (see `features`): the co-attended features of each decoder layer, (B, Q, D), and
    the memory that the decoder reads, (B, L, D), with its mask, bool (B, L): False for padding.
    """

    logits: Tensor
    boxes: Tensor
    co_attended: tuple[Tensor, ...] = ()
    memory: Tensor | None = None
    memory_mask: Tensor | None = None  # None: nothing is padding

    def take(self, pairs: Tensor) -> "Predictions":
        """The predictions reordered so that row q holds query `pairs[b, q]`; pairs is int64 (B, Q)."""
        return replace(
            self,
            logits=_rows(self.logits, pairs),
            boxes=_rows(self.boxes, pairs),
            co_attended=tuple(_rows(each, pairs) for each in self.co_attended),
        )


def _rows(x: Tensor, pairs: Tensor) -> Tensor:
    return x.gather(1, pairs[..., None].expand(-1, -1, x.shape[-1]))


def same_query(student: Predictions) -> Tensor:
    """Pairs (B, Q) of students and teachers that share their query embedding: query i with query i."""
    batch, queries = student.logits.shape[:2]
    return torch.arange(queries, device=student.logits.device).expand(batch, queries)


@torch.no_grad()
def hungarian_pairs(student: Predictions, teacher: Predictions, *, softmax: bool) -> Tensor:
    """Pairs (B, Q) that minimise class distance plus box distance, one partner for each student query.

    The teacher has as many queries or more. Needed where queries are a top-k selection (RT-DETR, D-FINE),
    since a little noise reorders them, and where student and teacher have different origins.
    """
    mine, theirs = _scores(student.logits, softmax), _scores(teacher.logits, softmax)
    cost = CLASS_COST * torch.cdist(mine, theirs, p=1)  # (B, Q, K)
    cost = cost + L1_COST * torch.cdist(student.boxes.float(), teacher.boxes.float(), p=1)
    return torch.stack([_assigned(each)[1] for each in cost]).to(student.logits.device)  # (B, Q)


@torch.no_grad()
def object_pairs(
    pairs: Tensor, student: Predictions, teacher: Predictions, labels: Labels, *, softmax: bool
) -> Tensor:
    """`pairs` (B, Q), but where student and teacher give an object to unlike queries: those two are partners.

    A student moves objects from query to query (of one at 4 bits without a teacher, a fifth). There its own
    assignment asks one query for the object and the teacher's another, so that twins teach it duplicates.
    The partner that a student's query so loses goes to the query whose partner it takes.
    """
    found = pairs.tolist()
    mine, theirs = (object_queries(each, labels, softmax=softmax) for each in (student, teacher))
    for row, (queries, objects), (others, known) in zip(found, mine, theirs, strict=True):
        owner = dict(zip(known.tolist(), others.tolist(), strict=True))
        for query, item in zip(queries.tolist(), objects.tolist(), strict=True):
            partner = owner.get(item, row[query])  # where a teacher has fewer queries than there are objects
            if partner in row:
                row[row.index(partner)] = row[query]
            row[query] = partner
    return torch.tensor(found, device=pairs.device)


@torch.no_grad()
def foreground_queries(boxes: Tensor, labels: Labels, *, tau: float = TAU) -> Tensor:
    """Which student queries are imitated, bool (B, Q): steps 1 and 2 of foreground-aware query matching.

    `boxes` (B, Q, 4) cxcywh. A query is kept where its GIoU with some object exceeds `tau` times the best
    GIoU that any query of the image has with that object (at least 0). An image without objects keeps none.
    """
    objects, real = _padded(labels, boxes)  # (B, T, 4), (B, T)
    overlap = giou(cxcywh_to_xyxy(objects)[:, :, None], cxcywh_to_xyxy(boxes.float())[:, None])  # (B, T, Q)
    best = overlap.amax(2, keepdim=True).clamp(min=0)
    return ((overlap > tau * best) & real[..., None]).any(1)


@torch.no_grad()
def nearest_boxes(student: Tensor, teacher: Tensor, *, overlap: float = 2.0, distance: float = 5.0) -> Tensor:
    """Pairs (B, Q): the teacher query whose box is nearest to each student's, step 3 of the matching.

    argmax over k of overlap * GIoU - distance * L1 (mu1 and mu2 of Q-DETR); boxes (B, Q, 4) and (B, K, 4),
    cxcywh. Several students may have one partner.
    """
    mine, theirs = student.float(), teacher.float()
    score = overlap * giou(cxcywh_to_xyxy(mine)[:, :, None], cxcywh_to_xyxy(theirs)[:, None])  # (B, Q, K)
    return (score - distance * torch.cdist(mine, theirs, p=1)).argmax(2)


@torch.no_grad()
def object_queries(predictions: Predictions, labels: Labels, *, softmax: bool) -> list[tuple[Tensor, Tensor]]:
    """For each image the queries and the objects of DETR's one-to-one assignment, int64 (min(Q, T),) each."""
    scores = _scores(predictions.logits, softmax)
    found = []
    for score, boxes, label in zip(scores, predictions.boxes.float(), labels, strict=True):
        objects = label["boxes"].float()
        cost = -CLASS_COST * score[:, label["class_labels"]] + L1_COST * torch.cdist(boxes, objects, p=1)
        cost = cost - GIOU_COST * giou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(objects)[None])
        queries, matched = _assigned(cost)
        found.append((queries.to(boxes.device), matched.to(boxes.device)))
    return found


def _assigned(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the cheapest assignment. What is no number (of a diverging training) is dear."""
    rows, columns = linear_sum_assignment(cost.nan_to_num(_DEAR, _DEAR, _DEAR).cpu().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def _scores(logits: Tensor, softmax: bool) -> Tensor:
    return logits.float().softmax(-1) if softmax else logits.float().sigmoid()


def _padded(labels: Labels, like: Tensor) -> tuple[Tensor, Tensor]:
    """The boxes of all images (B, T, 4), T the largest count, and which of them are real (B, T)."""
    counts = [len(label["boxes"]) for label in labels]
    boxes = like.new_zeros(len(labels), max(counts, default=0), 4, dtype=torch.float32)
    real = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=like.device)
    for index, (label, count) in enumerate(zip(labels, counts, strict=True)):
        boxes[index, :count] = label["boxes"].to(boxes)
        real[index, :count] = True
    return boxes, real
