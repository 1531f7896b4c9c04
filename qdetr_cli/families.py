"""DETR families: for each, where its parts are, how it scores classes, and what its pixels look like.

A family is one row of a table. Roles are found by the in-memory module path, which transformers names alike
in all families, so one table of patterns serves them all; a family with other names puts rows in front.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor

from qdetr_cli import plugins
from qdetr_cli.errors import CheckpointError
from qdetr_cli.processors import IMAGENET_MEAN, IMAGENET_STD, Processor
from qdetr_cli.roles import LAYOUT_ROLES, ROLES, YOLOS_ROLES, Roles

PostProcess = Literal["softmax", "top_k", "top_queries"]

DETR_PIXELS = Processor(shortest=800, longest=1333, mean=IMAGENET_MEAN, std=IMAGENET_STD, pad=True)
RT_DETR_PIXELS = Processor(size=(640, 640))
LW_DETR_PIXELS = Processor(size=(640, 640), mean=IMAGENET_MEAN, std=IMAGENET_STD)
RF_DETR_PIXELS = Processor(
    size=(560, 560), mean=IMAGENET_MEAN, std=IMAGENET_STD, antialias=False, rounded=False
)
LAYOUT_PIXELS = Processor(size=(800, 800), bicubic=True, antialias=False)

_OCR = "it finds text as a map of pixels, without queries and boxes"
_TEXT = "it finds what a text names, so it has no fixed list of classes to train and to measure"
REFUSED: dict[str, str] = {  # model_type -> why qdetr does not take it
    "grounding-dino": _TEXT,
    "mm-grounding-dino": _TEXT,
    "omdet-turbo": _TEXT,
    "owlvit": _TEXT,
    "owlv2": _TEXT,
    "pp_doclayout_v4": "it finds quadrilaterals, not boxes",
    "pp_ocrv5_mobile_det": _OCR,
    "pp_ocrv5_server_det": _OCR,
    "pp_ocrv6_small_det": _OCR,
    "pp_ocrv6_medium_det": _OCR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One DETR family of transformers, and all that qdetr must know of it."""

    name: str  # transformers' model_type
    model_class: str | type[Any]  # its class in transformers by name, or a plugin's own PreTrainedModel
    post_process: PostProcess
    attention: tuple[str, ...]  # class names of the dense attention modules
    frozen_batch_norm: tuple[str, ...]  # class names of its frozen batch norms
    deformable: tuple[str, ...] = ()  # class names of the deformable attention modules
    roles: Roles = ROLES  # (pattern, role), the first match on the module path decides
    processor: Processor = DETR_PIXELS  # for checkpoints that are saved without one
    own_backbone: bool = False  # it is built with one kind of backbone; False: with any of the backbone API
    class_prior: float | None = 0.01  # probability that a new class head starts from; None: as transformers
    fixed_queries: bool = True  # learned queries; False: chosen from the image, so their order is no identity
    auxiliary_changes_predictions: bool = False  # the decoder feeds on normed states if config.auxiliary_loss
    query_count: Callable[[Any], int] = attrgetter("num_queries")  # of a config: the queries of one image
    layer_losses: bool = True  # transformers can give every decoder layer a loss of its own
    query_groups: bool = False  # training runs config.group_detr groups of queries, each matched by itself
    trainable: bool = True  # transformers has a loss for it
    divisible: Callable[[Any], int] = lambda config: 1  # of a config: both sides of its images are multiples
    square: Callable[[Any], int | None] = lambda config: None  # of a config: side of the images it expects
    finest_stride: Callable[[Any], int] = lambda config: 32  # of a config: pixels between cells of queries
    query_argument: str | None = None  # of the decoder, where it gets `query_position_embeddings` as they are

    @property
    def kind(self) -> Any:
        """The class of its models; the `config_class` of it is what reads config.json."""
        own = self.model_class
        return getattr(transformers, own) if isinstance(own, str) else own

    @property
    def softmax(self) -> bool:
        """True where classes compete and the last logit is "no object"; False for a sigmoid per class."""
        return self.post_process == "softmax"

    @property
    def squash(self) -> bool:
        """True where images are resized to one size without regard to their aspect ratio."""
        return self.processor.size is not None


class Prediction(NamedTuple):
    """What a detector says about one image, best score first where the family ranks."""

    scores: Tensor  # (K,) 0..1
    labels: Tensor  # (K,) int64, class index of the model
    boxes: Tensor  # (K, 4) xyxy in pixels of the original image


def _row(name: str, prefix: str, attention: tuple[str, ...], **options: Any) -> Family:
    """A family whose classes all begin with `prefix`, as transformers names them."""
    options.setdefault("frozen_batch_norm", (f"{prefix}FrozenBatchNorm2d",))
    return Family(
        name=name,
        model_class=f"{prefix}ForObjectDetection",
        attention=tuple(prefix + suffix for suffix in attention),
        **options,
    )


def _rt_detr_row(
    name: str, prefix: str, attention: tuple[str, ...] = ("SelfAttention",), **options: Any
) -> Family:
    """A family of the RT-DETR line."""
    return _row(
        name,
        prefix,
        attention,
        deformable=(f"{prefix}MultiscaleDeformableAttention",),
        post_process="top_queries",
        processor=options.pop("processor", RT_DETR_PIXELS),
        class_prior=None,
        fixed_queries=False,
        divisible=lambda config: max(config.feat_strides),  # the pyramid is halved and doubled
        finest_stride=lambda config: min(config.feat_strides),
        **options,
    )


_BUILT_IN = (
    _row(
        "detr",
        "Detr",
        ("SelfAttention", "CrossAttention"),
        post_process="softmax",
        class_prior=None,
        auxiliary_changes_predictions=True,
        query_argument="object_queries_position_embeddings",
    ),
    _row(
        "conditional_detr",
        "ConditionalDetr",
        ("SelfAttention", "DecoderSelfAttention", "DecoderCrossAttention"),
        post_process="top_k",
        auxiliary_changes_predictions=True,
        query_argument="object_queries_position_embeddings",
    ),
    _row(
        "table-transformer",
        "TableTransformer",
        ("Attention",),
        post_process="softmax",
        class_prior=None,
        auxiliary_changes_predictions=True,
        query_argument="query_position_embeddings",
    ),
    _row(
        "deformable_detr",
        "DeformableDetr",
        ("SelfAttention",),
        deformable=("DeformableDetrMultiscaleDeformableAttention",),
        post_process="top_k",
        fixed_queries=False,  # chosen from the image in the two-stage variant
        finest_stride=lambda config: 8 if config.num_feature_levels > 1 else 32,
        query_count=lambda config: config.two_stage_num_proposals if config.two_stage else config.num_queries,
    ),
    Family(
        name="dab-detr",
        model_class="DabDetrForObjectDetection",
        attention=("DetrAttention", "DabDetrAttention"),
        frozen_batch_norm=("DabDetrFrozenBatchNorm2d",),
        post_process="top_k",
    ),
    Family(
        name="yolos",
        model_class="YolosForObjectDetection",
        attention=("YolosSelfAttention",),
        frozen_batch_norm=(),
        post_process="softmax",
        roles=YOLOS_ROLES,
        class_prior=None,
        query_count=attrgetter("num_detection_tokens"),
        own_backbone=True,
        layer_losses=False,  # transformers' code for them takes hidden states of the wrong shape
        divisible=attrgetter("patch_size"),
    ),
    _row(
        "lw_detr",
        "LwDetr",
        ("ViTAttention", "Attention"),
        deformable=("LwDetrMultiscaleDeformableAttention",),
        frozen_batch_norm=(),
        post_process="top_k",
        fixed_queries=False,
        query_groups=True,
        processor=LW_DETR_PIXELS,
        own_backbone=True,
        divisible=lambda config: config.backbone_config.patch_size * config.backbone_config.num_windows_side,
        finest_stride=lambda config: int(
            config.backbone_config.patch_size / max(config.projector_scale_factors)
        ),
    ),
    _row(
        "rf_detr",
        "RfDetr",
        ("Dinov2Attention", "Attention"),
        deformable=("RfDetrMultiscaleDeformableAttention",),
        frozen_batch_norm=(),
        post_process="top_queries",
        fixed_queries=False,
        query_groups=True,
        processor=RF_DETR_PIXELS,
        own_backbone=True,
        divisible=lambda config: config.backbone_config.patch_size * config.backbone_config.num_windows,
        square=lambda config: config.backbone_config.image_size,
        finest_stride=lambda config: config.backbone_config.patch_size,
    ),
    _rt_detr_row("rt_detr", "RTDetr"),
    _rt_detr_row("rt_detr_v2", "RTDetrV2"),
    _rt_detr_row("d_fine", "DFine"),
    _rt_detr_row("deimv2", "Deimv2"),
    _rt_detr_row(
        "pp_doclayout_v2",
        "PPDocLayoutV2",
        ("SelfAttention", "ReadingOrderSelfAttention"),
        roles=LAYOUT_ROLES,
        processor=LAYOUT_PIXELS,
        trainable=False,
    ),
    _rt_detr_row(
        "pp_doclayout_v3", "PPDocLayoutV3", roles=LAYOUT_ROLES, processor=LAYOUT_PIXELS, trainable=False
    ),
)
FAMILIES: dict[str, Family] = {row.name: plugins.register("family", row.name)(row) for row in _BUILT_IN}


def family_of(model: Any) -> Family:
    """The family of a model, a config or a `model_type`. Raises CheckpointError for what is not supported."""
    kind = model if isinstance(model, str) else getattr(getattr(model, "config", model), "model_type", None)
    if kind not in plugins.names("family"):
        reason = REFUSED.get(str(kind))
        what = f"is not supported: {reason}" if reason else "is not a detector that qdetr knows"
        raise CheckpointError(
            f"model_type {kind!r} {what}; supported: {', '.join(plugins.names('family'))} "
            "(a plugin of kind 'family' adds one: name its folder with --plugins)"
        )
    family: Family = plugins.get("family", kind)
    return family


def role_of(family: Family, path: str) -> str:
    """What the module at this in-memory path is in a DETR, such as "encoder.ffn"; "" if nothing matches."""
    return next((role for pattern, role in family.roles if re.search(pattern, path)), "")


def post_process(family: Family, outputs: Any, sizes: Tensor, *, top_k: int = 100) -> list[Prediction]:
    """The detections of each image, as transformers' image processors give them without a threshold.

    `outputs` has `logits` (B, Q, C) and `pred_boxes` (B, Q, 4) cxcywh in 0..1; `sizes` (B, 2) is H, W of the
    original in pixels. Softmax families give each query its best class, "no object" left out. Sigmoid
    families give the best (query, class) pairs: `top_k` in the Deformable line, Q in the RT-DETR line.
    """
    boxes = _pixels(outputs.pred_boxes, sizes)  # (B, Q, 4)
    if family.post_process == "softmax":
        scores, labels = outputs.logits.softmax(-1)[..., :-1].max(-1)  # (B, Q)
    else:
        queries, classes = outputs.logits.shape[1:]
        limit = queries if family.post_process == "top_queries" else min(top_k, queries * classes)
        scores, pairs = outputs.logits.sigmoid().flatten(1).topk(limit, dim=1)  # (B, K)
        labels = pairs % classes
        boxes = boxes.gather(1, (pairs // classes)[..., None].expand(-1, -1, 4))  # (B, K, 4)
    return [Prediction(*image) for image in zip(scores, labels, boxes, strict=True)]


def _pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """(B, Q, 4) xyxy in pixels from cxcywh in 0..1."""
    center, extent = boxes[..., :2], boxes[..., 2:]
    corners = torch.cat([center - extent / 2, center + extent / 2], dim=-1)
    return corners * sizes.to(boxes.device).flip(1).repeat(1, 2)[:, None]  # H, W -> W, H, W, H
