"""DETR as arXiv 2005.12872 has it, written for the tests with the module names of facebookresearch/detr.

An independent reference: torchvision's ResNet, torch's own transformer layers for parameters and attention,
and positions added to queries and keys as in the paper's appendix A.3. Nothing is taken from transformers.
"""

import math

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d


class Body(nn.Module):
    def __init__(self, network: str, dilation: bool):
        super().__init__()
        kind = getattr(torchvision.models, network)
        stages = [False, False, dilation]
        norm = FrozenBatchNorm2d
        resnet = kind(weights=None, norm_layer=norm, replace_stride_with_dilation=stages)
        self.body = IntermediateLayerGetter(resnet, {"layer4": "0"})
        self.channels = resnet.fc.in_features


class LearnedPositions(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.row_embed = nn.Embedding(50, width)
        self.col_embed = nn.Embedding(50, width)

    def forward(self, padding: Tensor) -> Tensor:  # (B, h, w) -> (B, h, w, 2 * width)
        height, width = padding.shape[1:]
        rows, columns = self.row_embed.weight[:height], self.col_embed.weight[:width]
        grid = torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], -1)
        return grid.expand(len(padding), -1, -1, -1)


def sine(padding: Tensor, width: int) -> Tensor:
    """(B, h, w) -> (B, h, w, 2 * width): `width` features of y, then of x; sines and cosines alternate."""
    features = []
    for axis in (1, 2):
        count = (~padding).float().cumsum(axis)
        angle = count / (count.select(axis, -1).unsqueeze(axis) + 1e-6) * 2 * math.pi
        for pair in range(width // 2):
            scaled = angle / 10000 ** (2 * pair / width)
            features += [scaled.sin(), scaled.cos()]
    return torch.stack(features, -1)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x).sigmoid()


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, layers: tuple[int, int], pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, ffn, batch_first=True) for _ in range(layers[0])
        )
        self.decoder.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, ffn, batch_first=True) for _ in range(layers[1])
        )
        self.decoder.norm = nn.LayerNorm(width)
        if pre_norm:
            self.encoder.norm = nn.LayerNorm(width)

    def residual(self, x, norm, branch):
        return x + branch(norm(x)) if self.pre_norm else norm(x + branch(x))

    def encode(self, layer, x, padding, position):
        def attention(y):
            return attend(layer.self_attn, y + position, y + position, y, padding)

        x = self.residual(x, layer.norm1, attention)
        return self.residual(x, layer.norm2, lambda y: feed_forward(layer, y))

    def decode(self, layer, x, memory, padding, position, query):
        def self_attention(y):
            return attend(layer.self_attn, y + query, y + query, y)

        def cross_attention(y):
            return attend(layer.multihead_attn, y + query, memory + position, memory, padding)

        x = self.residual(x, layer.norm1, self_attention)
        x = self.residual(x, layer.norm2, cross_attention)
        return self.residual(x, layer.norm3, lambda y: feed_forward(layer, y))

    def forward(self, x: Tensor, padding: Tensor, position: Tensor, query: Tensor) -> Tensor:
        for layer in self.encoder.layers:
            x = self.encode(layer, x, padding, position)
        memory = self.encoder.norm(x) if self.pre_norm else x
        target = torch.zeros_like(query)
        for layer in self.decoder.layers:
            target = self.decode(layer, target, memory, padding, position, query)
        return self.decoder.norm(target)


def feed_forward(layer, x):
    return layer.linear2(layer.linear1(x).relu())


def attend(attention, query, key, value, padding=None):
    return attention(query, key, value, key_padding_mask=padding, need_weights=False)[0]


class OriginalDETR(nn.Module):
    def __init__(
        self,
        *,
        network="resnet18",
        classes=91,
        width=32,
        heads=4,
        ffn=48,
        layers=(2, 3),
        queries=7,
        dilation=False,
        pre_norm=False,
        learned=False,
    ):
        super().__init__()
        body = Body(network, dilation)
        self.backbone = nn.Sequential(body, LearnedPositions(width // 2) if learned else nn.Identity())
        self.learned = learned
        self.input_proj = nn.Conv2d(body.channels, width, 1)
        self.query_embed = nn.Embedding(queries, width)
        self.transformer = Transformer(width, heads, ffn, layers, pre_norm)
        self.class_embed = nn.Linear(width, classes + 1)
        self.bbox_embed = MLP(width)

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), True where (B, H, W) is padding -> logits (B, Q, C + 1), boxes (B, Q, 4)."""
        features = self.input_proj(self.backbone[0].body(images)["0"])  # (B, D, h, w)
        small = nn.functional.interpolate(padding[None].float(), features.shape[-2:])[0].bool()  # (B, h, w)
        position = self.backbone[1](small) if self.learned else sine(small, features.shape[1] // 2)
        query = self.query_embed.weight.expand(len(images), -1, -1)
        tokens = features.flatten(2).transpose(1, 2)  # (B, L, D)
        states = self.transformer(tokens, small.flatten(1), position.flatten(1, 2), query)
        return self.class_embed(states), self.bbox_embed(states)


def random_detr(**options) -> OriginalDETR:
    """In eval mode, with statistics and biases that matter, so that no mistake of a name can hide."""
    torch.manual_seed(0)
    model = OriginalDETR(**options).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    return model
