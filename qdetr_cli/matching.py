"""Which teacher query is the partner of which student query."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CLASS_COST, L1_COST = 2.0, 5.0  # DETR's matching weights, on probabilities and on cxcywh in 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What a detector says of a batch: logits (B, Q, C) and boxes (B, Q, 4), cxcywh in 0..1."""

    logits: Tensor
    boxes: Tensor

    def take(self, pairs: Tensor) -> "Predictions":
        """The predictions reordered so that row q holds query `pairs[b, q]`; pairs is int64 (B, Q)."""
        boxes = self.boxes.gather(1, pairs[..., None].expand(-1, -1, 4))
        logits = self.logits.gather(1, pairs[..., None].expand(-1, -1, self.logits.shape[-1]))
        return Predictions(logits=logits, boxes=boxes)


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
    kind = torch.softmax if softmax else lambda logits, dim: logits.sigmoid()
    mine, theirs = kind(student.logits.float(), dim=-1), kind(teacher.logits.float(), dim=-1)
    cost = CLASS_COST * torch.cdist(mine, theirs, p=1)  # (B, Q, Q)
    cost = cost + L1_COST * torch.cdist(student.boxes.float(), teacher.boxes.float(), p=1)
    columns = [torch.as_tensor(linear_sum_assignment(each)[1]) for each in cost.cpu().numpy()]
    return torch.stack(columns).to(student.logits.device)  # (B, Q)
