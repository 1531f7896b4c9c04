"""Family `anchor_detr`: a detector that transformers does not have, after Anchor DETR (Wang et al., 2021,
arXiv:2109.07107): queries are learned points, and boxes are relative to them. Dense attention, one level.

qdetr finetune MODEL --recipe w4a4 --data DATA --out OUT --plugins plugins, where MODEL is a folder that its
save_pretrained wrote, or a file of its training script. What qdetr has to be told of it stands at the end.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput as Output

from qdetr_cli.families import Family
from qdetr_cli.original import Layout, Original, OriginalFile
from qdetr_cli.plugins import register


class AnchorDetrConfig(PretrainedConfig):
    """What config.json holds; the set loss of transformers reads the last block."""

    model_type = "anchor_detr"
    backbone_config: Any = None
    width: int = 256
    heads: int = 8
    ffn: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 300

    auxiliary_loss: bool = True
    class_cost: float = 2.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0
    focal_alpha: float = 0.25
    bbox_loss_coefficient: float = 5.0
    giou_loss_coefficient: float = 2.0

    def __post_init__(self, **rest: Any) -> None:
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**rest)


class AnchorAttention(nn.Module):
    """Dense attention, written out: two products and a softmax, which qdetr finds in the graph."""

    def __init__(self, config: AnchorDetrConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Q, D) of query (B, Q, D), key and value (B, L, D); mask (B, 1, 1, L) is added to the scores."""
        projected = self.q(query), self.k(key), self.v(value)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)  # (B, N, ., d)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, N, Q, L)
        probs = (scores if mask is None else scores + mask).softmax(-1)
        mixed: Tensor = self.out((probs @ v).transpose(1, 2).flatten(2))
        return mixed


class AnchorLayer(nn.Module):
    """A pre-norm layer of the encoder, or, with `cross`, of the decoder."""

    def __init__(self, config: AnchorDetrConfig, *, cross: bool = False) -> None:
        super().__init__()
        self.own, self.cross = AnchorAttention(config), AnchorAttention(config) if cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.ffn = _two_layers(config.width, config.ffn, config.width)

    def forward(self, x: Tensor, place: Tensor, mask: Tensor | None, *memory: Tensor) -> Tensor:
        """(B, tokens, D) again; `memory` is what is looked at, and its places. The mask is for pixels."""
        own = self.norms[0](x)
        x = x + self.own(own + place, own + place, own, None if memory else mask)
        if self.cross is not None:
            seen, where = memory
            x = x + self.cross(self.norms[1](x) + place, seen + where, seen, mask)
        moved: Tensor = x + self.ffn(self.norms[2](x))
        return moved


class AnchorDetr(PreTrainedModel):  # type: ignore[misc]
    """Backbone, encoder, decoder that asks at learned points, and heads that all of its layers share."""

    config_class = AnchorDetrConfig

    def __init__(self, config: AnchorDetrConfig) -> None:
        super().__init__(config)
        width = config.width
        self.body = AutoBackbone.from_config(config.backbone_config)
        self.shrink = nn.Conv2d(self.body.channels[-1], width, 1)
        self.points = nn.Embedding(config.num_queries, 2)
        self.place = _two_layers(width, width, width)
        self.encoder = nn.ModuleList(AnchorLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(AnchorLayer(config, cross=True) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, config.num_labels)
        self.locate = _two_layers(width, width, 4)
        self.loss_function = DeformableDetrForObjectDetectionLoss
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: Any = None) -> Output:
        """Logits (B, Q, C) and boxes (B, Q, 4) of (B, 3, H, W); `pixel_mask` (B, H, W) is 1 on the images."""
        maps = self.shrink(self.body(pixel_values).feature_maps[-1])  # (B, D, h, w)
        valid = maps.new_ones(maps[:, 0].shape)
        if pixel_mask is not None:
            valid = F.interpolate(pixel_mask[:, None].to(maps.dtype), size=maps.shape[-2:])[:, 0]
        mask = (valid.flatten(1)[:, None, None] - 1) * 1e4  # (B, 1, 1, L)
        x, y = ((valid.cumsum(i) - 0.5) / valid.sum(i, keepdim=True).clamp(min=1) for i in (2, 1))
        where = self.place(self._waves(torch.stack([x, y], -1).flatten(1, 2)))  # (B, L, D)
        seen = maps.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            seen = layer(seen, where, mask)
        points = self.points.weight.sigmoid().expand(len(seen), -1, -1)  # (B, Q, 2)
        place = self.place(self._waves(points))  # (B, Q, D)
        state, found = torch.zeros_like(place), []
        for layer in self.decoder:
            state = layer(state, place, mask, seen, where)
            found.append(self._heads(self.norm(state), points))
        output = Output(logits=found[-1][0], pred_boxes=found[-1][1])
        if labels is not None:
            stacks = [torch.stack(each) for each in zip(*found, strict=True)]  # (layers, B, Q, .)
            output.loss, output.loss_dict, _ = self.loss_function(
                output.logits, labels, self.device, output.pred_boxes, self.config, *stacks
            )
        return output

    def _heads(self, state: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        boxes = self.locate(state) + F.pad(points.logit(eps=1e-5), (0, 2))
        return self.classify(state), boxes.sigmoid()

    def _waves(self, points: Tensor) -> Tensor:
        """(..., D), sine and cosine of points (..., 2) in 0..1."""
        octaves = 2 ** torch.arange(self.config.width // 4, device=points.device)
        angles = 2 * torch.pi * points[..., None] * octaves
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def _two_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


register("family", "anchor_detr")(
    Family(
        name="anchor_detr",
        model_class=AnchorDetr,
        post_process="top_k",
        attention=("AnchorAttention",),
        frozen_batch_norm=(),
        roles=(
            (r"^body\.embedder", "backbone.stem"),
            (r"^body", "backbone"),
            (r"^shrink", "input_proj"),
            (r"^encoder\.\d+\.own", "encoder.attention"),
            (r"^encoder\.\d+\.ffn", "encoder.ffn"),
            (r"^decoder\.\d+\.own", "decoder.self_attention"),
            (r"^decoder\.\d+\.cross", "decoder.cross_attention"),
            (r"^decoder\.\d+\.ffn", "decoder.ffn"),
            (r"^classify", "class_head"),
            (r"^locate\.2", "box_head.last"),
            (r"^locate", "box_head"),
            (r"^(?:points|place)", "query"),
        ),
    )
)


def read_training_file(file: OriginalFile) -> Original:
    """The model of torch.save({"model": model.state_dict(), "args": Namespace(config=config.to_dict())})."""
    if "config" not in file.args:
        raise file.fail("does not say its config; save it as args.config")
    return Original(config=file.args["config"], state=file.state)


register("layout", "anchor_detr")(
    Layout(
        repository="anchor_detr (training files)",
        families=("anchor_detr",),
        marks=(r"^points\.weight$", r"^locate\.2\.weight$"),
        read=read_training_file,
        settings=(),
    )
)
