"""DETR families: for each, where its parts are, how it scores classes, and what its pixels look like.

A family is one row of a table. Roles are found by the in-memory module path, which transformers names alike
in all families, so one table of patterns serves them all; a family with other names puts rows in front.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qdetr_cli import plugins
from qdetr_cli.errors import CheckpointError
from qdetr_cli.processors import IMAGENET_MEAN, IMAGENET_STD, Processor

Roles = tuple[tuple[str, str], ...]
PostProcess = Literal["softmax", "top_k", "top_queries"]

HEAD = r"^(?:model\.)?(?:decoder\.)?"
BOX_HEAD = HEAD + r"(?:bbox_predictor|enc_bbox_head|pre_bbox_head|bbox_embed(?:\.\d+)?)"
ENCODER_LAYER = r"^model\.encoder\.(?:aifi\.\d+\.)?layers\.\d+\."
DECODER_LAYER = r"^model\.decoder\.layers\.\d+\."
BACKBONE = r"^model\.(?:backbone|conv_encoder)\.(?:conv_encoder\.)?"

ROLES: Roles = (
    (r"\.(?:sampling_offsets|attention_weights)$", "sampling"),
    (r"^model\.(?:conv_encoder\.)?(?:(?:(?:en|de)coder_)?input_proj|input_projection)(?:\.|$)", "input_proj"),
    (BACKBONE + r"model\.(?:_backbone\.)?(?:embedder|stem|stem_\d+|conv1|bn1)(?:\.|$)", "backbone.stem"),
    (BACKBONE, "backbone"),
    (HEAD + r"(?:class_labels_classifier|class_embed|enc_score_head|lqe_layers)(?:\.|$)", "class_head"),
    (BOX_HEAD + r"\.layers\.2$", "box_head.last"),
    (BOX_HEAD + r"(?:\.|$)", "box_head"),
    (ENCODER_LAYER + r"self_attn(?:\.|$)", "encoder.attention"),
    (ENCODER_LAYER + r"(?:mlp|fc1|fc2)(?:\.|$)", "encoder.ffn"),
    (r"^model\.encoder\.(?:lateral_convs|fpn_blocks|downsample_convs|pan_blocks)(?:\.|$)", "encoder.conv"),
    (r"^model\.encoder(?:\.|$)", "encoder"),
    (DECODER_LAYER + r"self_attn(?:\.|$)", "decoder.self_attention"),
    (DECODER_LAYER + r"(?:encoder_attn|cross_attn)(?:\.|$)", "decoder.cross_attention"),
    (DECODER_LAYER + r"(?:mlp|fc1|fc2)(?:\.|$)", "decoder.ffn"),
    (r"^model\.decoder\.(?:query_scale|query_pos_head|ref_point_head|ref_anchor_head)(?:\.|$)", "query"),
    (r"^model\.(?:query_(?:position|refpoint)_embeddings|reference_points|denoising_class_embed)$", "query"),
    (r"^model\.(?:enc_output|pos_trans|weight_embedding)(?:\.|$)", "query"),
    (r"^model\.decoder(?:\.|$)", "decoder.other"),
)

DETR_PIXELS = Processor(shortest=800, longest=1333, mean=IMAGENET_MEAN, std=IMAGENET_STD, pad=True)
RT_DETR_PIXELS = Processor(size=(640, 640))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One DETR family of transformers, and all that qdetr must know of it."""

    name: str  # transformers' model_type
    model_class: str  # its class in transformers
    post_process: PostProcess
    attention: tuple[str, ...]  # class names of the dense attention modules
    frozen_batch_norm: tuple[str, ...]  # class names of its frozen batch norms
    deformable: tuple[str, ...] = ()  # class names of the deformable attention modules
    roles: Roles = ROLES  # (pattern, role), the first match on the module path decides
    processor: Processor = DETR_PIXELS  # for checkpoints that are saved without one
    class_prior: float | None = 0.01  # probability that a new class head starts from; None: as transformers
    fixed_queries: bool = True  # learned queries; False: chosen from the image, so their order is no identity
    auxiliary_changes_predictions: bool = False  # the decoder feeds on normed states if config.auxiliary_loss
    query_argument: str | None = None  # of the decoder, where it gets `query_position_embeddings` as they are

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
    return Family(
        name=name,
        model_class=f"{prefix}ForObjectDetection",
        attention=tuple(prefix + suffix for suffix in attention),
        frozen_batch_norm=(f"{prefix}FrozenBatchNorm2d",),
        **options,
    )


def _rt_detr_row(name: str, prefix: str) -> Family:
    """A family of the RT-DETR line."""
    return _row(
        name,
        prefix,
        ("SelfAttention",),
        deformable=(f"{prefix}MultiscaleDeformableAttention",),
        post_process="top_queries",
        processor=RT_DETR_PIXELS,
        class_prior=None,
        fixed_queries=False,
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
    ),
    Family(
        name="dab-detr",
        model_class="DabDetrForObjectDetection",
        attention=("DetrAttention", "DabDetrAttention"),
        frozen_batch_norm=("DabDetrFrozenBatchNorm2d",),
        post_process="top_k",
    ),
    _rt_detr_row("rt_detr", "RTDetr"),
    _rt_detr_row("rt_detr_v2", "RTDetrV2"),
    _rt_detr_row("d_fine", "DFine"),
    _rt_detr_row("deimv2", "Deimv2"),
)
FAMILIES: dict[str, Family] = {row.name: plugins.register("family", row.name)(row) for row in _BUILT_IN}


def family_of(model: Any) -> Family:
    """The family of a model, a config or a `model_type`. Raises CheckpointError for what is not supported."""
    kind = model if isinstance(model, str) else getattr(getattr(model, "config", model), "model_type", None)
    if kind not in plugins.names("family"):
        raise CheckpointError(
            f"model_type {kind!r} is not a detector that qdetr knows; supported: "
            f"{', '.join(plugins.names('family'))} (a plugin of kind 'family' adds one)"
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
