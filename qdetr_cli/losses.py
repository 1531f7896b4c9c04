"""What is minimised: the family's own detection loss with Hungarian matching, and distillation terms.

Every loss comes as a dict of scalars; weights are a dict with the same keys, and one sum makes the total.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from qdetr_cli import plugins
from qdetr_cli.boxes import cxcywh_to_xyxy, giou
from qdetr_cli.data import Batch
from qdetr_cli.errors import DivergedError, RunError
from qdetr_cli.families import Family
from qdetr_cli.matching import Predictions, hungarian_pairs, same_query

LAYER_SUFFIX = re.compile(r"_(aux_|dn_)?\d+$")
L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0  # DETR's box loss coefficients
BACKGROUND_WEIGHT = 0.1  # DETR's eos_coefficient: how much an empty query counts

DistillTerm = Callable[[Predictions, Predictions, bool], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionLoss:
    """The loss of one batch: the total, its terms summed over decoder layers, and the predictions."""

    total: Tensor
    terms: dict[str, Tensor]
    predictions: Predictions


def detection_loss(model: nn.Module, family: Family, batch: Batch, *, auxiliary: bool) -> DetectionLoss:
    """The family's own set loss (transformers' implementation) of `model` on `batch`.

    `auxiliary` adds the loss of every decoder layer, where the family has decoder layers. It never changes
    the predictions: DETR, Conditional-DETR and Table Transformer would feed the normed state on when
    `config.auxiliary_loss` is set, so where the checkpoint has it off the layers are read with hooks and only
    the loss sees a changed copy of the config. The predictions are those of the queries that eval mode has.
    `model` may be wrapped (DDP): the loss is computed inside its forward. RunError where there is no loss.
    """
    check_trainable(family)
    inner = cast(nn.Module, getattr(model, "module", model))
    with _loss_in_forward(inner, family, auxiliary and family.layer_losses):
        outputs = model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask, labels=batch.labels)
    terms: dict[str, Tensor] = {}
    for name, value in outputs.loss_dict.items():
        key = LAYER_SUFFIX.sub("", name)
        terms[key] = terms.get(key, torch.zeros_like(value.detach())) + value.detach()
    found = _first_group(predictions_of(outputs), _query_groups(inner, family))
    return DetectionLoss(total=outputs.loss, terms=terms, predictions=found)


def check_trainable(family: Family) -> None:
    """Raise RunError for a family that transformers has no loss for."""
    if not family.trainable:
        raise RunError(
            f"{family.name}: transformers has no loss for it, so it cannot be trained; inspect, quantize "
            "(calibration alone) and eval work"
        )


def _query_groups(model: Any, family: Family) -> int:
    """How many groups of queries a forward pass runs: in eval mode one."""
    return int(model.config.group_detr) if family.query_groups and model.training else 1


def _first_group(predictions: Predictions, groups: int) -> Predictions:
    """Those of the group that eval mode has."""
    queries = predictions.logits.shape[1] // groups
    return Predictions(logits=predictions.logits[:, :queries], boxes=predictions.boxes[:, :queries])


def predictions_of(outputs: Any) -> Predictions:
    """The real queries' predictions: denoising queries, which come first, are left out."""
    denoising = getattr(outputs, "denoising_meta_values", None)
    logits, boxes = _real_queries(outputs.logits, outputs.pred_boxes, denoising)
    return Predictions(logits=logits, boxes=boxes)


def _real_queries(logits: Tensor, boxes: Tensor, denoising: Any) -> tuple[Tensor, Tensor]:
    """Logits and boxes without the denoising queries that transformers' `denoising_meta_values` counts."""
    if denoising is None or logits.shape[1] != sum(denoising["dn_num_split"]):
        return logits, boxes
    first = denoising["dn_num_split"][0]
    return logits[:, first:], boxes[:, first:]


def distillation_loss(
    terms: Mapping[str, float],
    family: Family,
    student: Predictions,
    teacher: Predictions,
    *,
    same_origin: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of distillation terms, and each term unweighted. The teacher carries no gradient.

    `same_origin` says that the student began as the teacher: then learned queries correspond one to one.
    """
    if same_origin and family.fixed_queries:
        pairs = same_query(student)
    else:
        pairs = hungarian_pairs(student, teacher, softmax=family.softmax)
    partner = teacher.take(pairs)
    values = {
        name: cast(DistillTerm, plugins.get("loss", name))(student, partner, family.softmax) for name in terms
    }
    total = torch.stack([weight * values[name] for name, weight in terms.items()]).sum()
    return total, {f"distill_{name}": value.detach() for name, value in values.items()}


@plugins.register("loss", "logits")
def logits_term(student: Predictions, teacher: Predictions, softmax: bool) -> Tensor:
    """Distance of class distributions, a scalar; a query counts as much as the teacher sees an object there.

    Softmax families: KL(teacher || student). Sigmoid families: quality focal loss (Li et al., 2020, eq. 1)
    with the teacher's probability as the target.
    """
    weight = BACKGROUND_WEIGHT + _foreground(teacher, softmax)  # (B, Q)
    mine, theirs = student.logits.float(), teacher.logits.float()
    if softmax:
        distance = functional.kl_div(
            mine.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
    else:
        target = theirs.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(mine, target, reduction="none")
        distance = (entropy * (mine.sigmoid() - target).square()).sum(-1)
    mean: Tensor = (weight * distance).sum() / weight.sum()
    return mean


@plugins.register("loss", "boxes")
def boxes_term(student: Predictions, teacher: Predictions, softmax: bool) -> Tensor:
    """DETR's box loss (5 L1 + 2 GIoU) against the teacher's boxes, weighted by its confidence; a scalar."""
    weight = _foreground(teacher, softmax)  # (B, Q)
    l1 = (student.boxes.float() - teacher.boxes.float()).abs().sum(-1)
    overlap = giou(cxcywh_to_xyxy(student.boxes), cxcywh_to_xyxy(teacher.boxes))
    total: Tensor = (weight * (L1_WEIGHT * l1 + GIOU_WEIGHT * (1 - overlap))).sum()
    return total / weight.sum().clamp(min=1e-6)


def _foreground(predictions: Predictions, softmax: bool) -> Tensor:
    """How sure each query is of any object, 0..1, (B, Q), without gradient."""
    logits = predictions.logits.detach().float()
    scores = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    return scores.amax(-1)


@contextmanager
def _loss_in_forward(model: nn.Module, family: Family, auxiliary: bool) -> Iterator[None]:
    """For the duration of the block, the loss in `model`'s forward has (or has not) auxiliary terms."""
    layers: list[Tensor] = []
    decoder: list[Any] = []
    own = cast(Any, model).loss_function
    config = cast(Any, model).config
    flag = config.auxiliary_loss
    wanted = copy.copy(config)
    wanted.auxiliary_loss = auxiliary
    if family.query_groups:
        wanted.group_detr = _query_groups(model, family)  # transformers matches in groups in eval mode too
    read_layers = auxiliary and not flag and family.auxiliary_changes_predictions
    if not family.auxiliary_changes_predictions:
        config.auxiliary_loss = auxiliary  # DAB-DETR hands its layers to the loss only then

    def loss(
        logits: Tensor, labels: Any, device: Any, boxes: Tensor, _: Any, *stacks: Any, **rest: Any
    ) -> Any:
        if read_layers:
            stacks = auxiliary_predictions(model, layers, decoder[-1])
        if not auxiliary:  # denoising queries have auxiliary losses alone; DEIMv2 would match them as well
            logits, boxes = _real_queries(logits, boxes, rest.pop("denoising_meta_values", None))
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise DivergedError("the predictions are not finite")  # the matcher would not say so
        with torch.autocast(device_type=torch.device(device).type, enabled=False):
            floats = [None if stack is None else stack.float() for stack in stacks]
            rest = {name: _as_float(value) for name, value in rest.items()}
            return own(logits.float(), labels, device, boxes.float(), wanted, *floats, **rest)

    handles = _record_layers(model, layers, decoder) if read_layers else []
    cast(Any, model).loss_function = loss
    try:
        yield
    finally:
        config.auxiliary_loss = flag
        cast(Any, model).loss_function = own
        for handle in handles:
            handle.remove()


def auxiliary_predictions(model: Any, layers: list[Tensor], decoder: Any) -> tuple[Tensor, Tensor]:
    """Logits (layers, B, Q, C) and boxes (layers, B, Q, 4) of every decoder layer, as in the original DETR.

    A normed *copy* of each layer's output goes through the shared heads; the layers themselves are untouched.
    """
    states = model.model.decoder.layernorm(torch.stack(layers))  # (layers, B, Q, D)
    logits, boxes = model.class_labels_classifier(states), model.bbox_predictor(states)
    reference = getattr(decoder, "reference_points", None)  # Conditional-DETR, (Q, B, 2)
    if reference is not None:
        centre = torch.logit(reference.clamp(0, 1), eps=1e-5).transpose(0, 1)  # (B, Q, 2)
        boxes = torch.cat([boxes[..., :2] + centre, boxes[..., 2:]], dim=-1)
    return logits, boxes.sigmoid()


def _record_layers(model: Any, layers: list[Tensor], decoder: list[Any]) -> list[RemovableHandle]:
    def keep_layer(module: nn.Module, inputs: Any, output: Any) -> None:
        layers.append(output[0] if isinstance(output, tuple) else output)

    def keep_decoder(module: nn.Module, inputs: Any, output: Any) -> None:
        decoder.append(output)

    handles = [layer.register_forward_hook(keep_layer) for layer in model.model.decoder.layers]
    return [*handles, model.model.decoder.register_forward_hook(keep_decoder)]


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
