"""State dicts as lyuwenyu/RT-DETR and Peterande/D-FINE write them: names and shapes, from a few sizes.

Facts only. Values are random, with statistics and biases that matter, so that no mistake of a name can hide.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

GAIN = 2.6  # of HGNetV2, which damps: its tensors shall show in the predictions
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def conv(
    name: str, out: int, into: int, kernel: int, convolution: str = "conv", norm: str = "norm"
) -> Shapes:
    yield f"{name}.{convolution}.weight", (out, into, kernel, kernel)
    yield from (
        (f"{name}.{norm}.{each}", (out,)) for each in ("weight", "bias", "running_mean", "running_var")
    )
    yield f"{name}.{norm}.num_batches_tracked", ()


def linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def mlp(name: str, *widths: int) -> Shapes:
    for index, (into, out) in enumerate(itertools.pairwise(widths)):
        yield from linear(f"{name}.layers.{index}", out, into)


def attention(name: str, width: int) -> Shapes:
    yield f"{name}.in_proj_weight", (3 * width, width)
    yield f"{name}.in_proj_bias", (3 * width,)
    yield from linear(f"{name}.out_proj", width, width)


def resnet(depths: tuple[int, ...], bottleneck: bool) -> tuple[Shapes, list[int]]:
    """(shapes of a ResNet-vd, channels of its stages)"""
    growth = 4 if bottleneck else 1
    channels = [width * growth for width in (64, 128, 256, 512)]

    def shapes() -> Shapes:
        for index, (out, into) in enumerate(((32, 3), (32, 32), (64, 32)), start=1):
            yield from conv(f"backbone.conv1.conv1_{index}", out, into, 3)
        into = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            for block in range(depth):
                name = f"backbone.res_layers.{stage}.blocks.{block}"
                if block == 0:
                    yield from conv(f"{name}.short" + (".conv" if stage else ""), channels[stage], into, 1)
                yield from conv(f"{name}.branch2a", width, into, 1 if bottleneck else 3)
                yield from conv(f"{name}.branch2b", width, width, 3)
                if bottleneck:
                    yield from conv(f"{name}.branch2c", channels[stage], width, 1)
                into = channels[stage]

    return shapes(), channels


def hgnet(affine: bool, padded: bool) -> tuple[Shapes, list[int]]:
    """(shapes of a small HGNetV2, channels of its stages); `padded`: the names of RT-DETRv2, else D-FINE's"""
    channels = [16, 24, 32, 40]

    def layer(name: str, out: int, into: int, kernel: int, act: bool = True, inner: str = "conv") -> Shapes:
        yield from conv(name, out, into, kernel, inner, "bn")
        if affine and act:
            yield from ((f"{name}.lab.{each}", (1,)) for each in ("scale", "bias"))

    def shapes() -> Shapes:
        two = "conv.1" if padded else "conv"
        yield from layer("backbone.stem.stem1", 8, 3, 3)
        yield from layer("backbone.stem.stem2a", 4, 8, 2, inner=two)
        yield from layer("backbone.stem.stem2b", 8, 4, 2, inner=two)
        yield from layer("backbone.stem.stem3", 8, 16, 3)
        yield from layer("backbone.stem.stem4", 12, 8, 1)
        into = 12
        for stage, out in enumerate(channels):
            name, mid, light = f"backbone.stages.{stage}", 6 + 2 * stage, stage > 1
            if stage:
                yield from layer(f"{name}.downsample", into, 1, 3, act=False)
            for block in range(2 if stage == 2 else 1):
                inner, first = f"{name}.blocks.{block}", into if block == 0 else out
                for index in range(3):
                    each, taken = f"{inner}.layers.{index}", first if index == 0 else mid
                    if light:
                        yield from layer(f"{each}.conv1", mid, taken, 1, act=False)
                        yield from layer(f"{each}.conv2", mid, 1, 5)
                    else:
                        yield from layer(each, mid, taken, 3)
                names = ("aggregation_squeeze_conv", "aggregation_excitation_conv")
                squeeze, excite = names if padded else ("aggregation.0", "aggregation.1")
                yield from layer(f"{inner}.{squeeze}", out // 2, first + 3 * mid, 1)
                yield from layer(f"{inner}.{excite}", out, out // 2, 1)
            into = out

    return shapes(), channels


def csp(name: str, out: int, into: int, blocks: int) -> Shapes:
    yield from conv(f"{name}.conv1", out, into, 1)
    yield from conv(f"{name}.conv2", out, into, 1)
    for block in range(blocks):
        yield from conv(f"{name}.bottlenecks.{block}.conv1", out, out, 3)
        yield from conv(f"{name}.bottlenecks.{block}.conv2", out, out, 1)


def rep_block(name: str, width: int, inner: int) -> Shapes:
    """RT-DETR's block of the hybrid encoder."""
    yield from csp(name, inner, 2 * width, 3)
    if inner != width:
        yield from conv(f"{name}.conv3", width, inner, 1)


def elan_block(name: str, width: int, inner: int) -> Shapes:
    """D-FINE's."""
    yield from conv(f"{name}.cv1", 2 * width, 2 * width, 1)
    for part, into in (("cv2", width), ("cv3", inner)):
        yield from csp(f"{name}.{part}.0", inner, into, 2)
        yield from conv(f"{name}.{part}.1", inner, inner, 3)
    yield from conv(f"{name}.cv4", width, 2 * width + 2 * inner, 1)


def encoder(taken: list[int], width: int, ffn: int, inner: int, fine: bool, named: bool) -> Shapes:
    projection = ("conv", "norm") if named else ("0", "1")
    for level, channels in enumerate(taken):
        yield from conv(f"encoder.input_proj.{level}", width, channels, 1, *projection)
    layer = "encoder.encoder.0.layers.0"
    yield from attention(f"{layer}.self_attn", width)
    yield from linear(f"{layer}.linear1", ffn, width)
    yield from linear(f"{layer}.linear2", width, ffn)
    yield from (each for index in (1, 2) for each in norm(f"{layer}.norm{index}", width))
    block: Callable[[str, int, int], Shapes] = elan_block if fine else rep_block
    for step in range(len(taken) - 1):
        yield from conv(f"encoder.lateral_convs.{step}", width, width, 1)
        yield from block(f"encoder.fpn_blocks.{step}", width, inner)
        if fine:
            yield from conv(f"encoder.downsample_convs.{step}.0.cv1", width, width, 1)
            yield from conv(f"encoder.downsample_convs.{step}.0.cv2", width, 1, 3)
        else:
            yield from conv(f"encoder.downsample_convs.{step}", width, width, 3)
        yield from block(f"encoder.pan_blocks.{step}", width, inner)


def decoder_layer(name: str, width: int, ffn: int, samples: int, fine: bool) -> Shapes:
    yield from attention(f"{name}.self_attn", width)
    yield from linear(f"{name}.cross_attn.sampling_offsets", 2 * samples, width)
    yield from linear(f"{name}.cross_attn.attention_weights", samples, width)
    yield from norm(f"{name}.norm1", width)
    if fine:
        yield from linear(f"{name}.gateway.gate", 2 * width, 2 * width)
        yield from norm(f"{name}.gateway.norm", width)
    else:
        yield from linear(f"{name}.cross_attn.value_proj", width, width)
        yield from linear(f"{name}.cross_attn.output_proj", width, width)
        yield from norm(f"{name}.norm2", width)
    yield from linear(f"{name}.linear1", ffn, width)
    yield from linear(f"{name}.linear2", width, ffn)
    yield from norm(f"{name}.norm3", width)


def decoder(
    width: int, ffn: int, layers: int, classes: int, samples: int, levels: int, fine: bool, named: bool
) -> Shapes:
    projection, score = ("proj", "norm") if named else ("0", "1"), 4 * 33 if fine else 4
    if not fine:
        for level in range(levels):
            yield from conv(f"decoder.input_proj.{level}", width, width, 1)
    for index in range(layers):
        yield from decoder_layer(f"decoder.decoder.layers.{index}", width, ffn, samples, fine)
        yield from linear(f"decoder.dec_score_head.{index}", classes, width)
        yield from mlp(f"decoder.dec_bbox_head.{index}", width, width, width, score)
        if fine:
            yield from mlp(f"decoder.decoder.lqe_layers.{index}.reg_conf", 20, 64, 1)
    if fine:
        yield from mlp("decoder.pre_bbox_head", width, width, width, 4)
    yield "decoder.denoising_class_embed.weight", (classes + 1, width)
    yield from mlp("decoder.query_pos_head", 4, 2 * width, width)
    yield from linear(f"decoder.enc_output.{projection[0]}", width, width)
    yield from norm(f"decoder.enc_output.{projection[1]}", width)
    yield from linear("decoder.enc_score_head", classes, width)
    yield from mlp("decoder.enc_bbox_head", width, width, width, 4)


def original_state(
    kind: str = "v1",
    *,
    backbone: str = "basic",
    classes: int = 5,
    width: int = 32,
    ffn: int = 48,
    inner: int = 16,
    layers: int = 3,
    points: tuple[int, ...] = (4, 4, 4),
    heads: int = 8,
) -> dict[str, Tensor]:
    """The state dict of a small model: `kind` is v1, v2 (RT-DETR's trees) or d_fine."""
    fine, named = kind == "d_fine", kind != "v1"
    depths = {"basic": (1, 2, 1, 1), "bottleneck": (1, 1, 2, 1)}
    if backbone.startswith("hgnet"):
        shapes, channels = hgnet(affine=fine, padded=not fine)
    else:
        shapes, channels = resnet(depths[backbone], bottleneck=backbone == "bottleneck")
    parts = dict(shapes)
    parts |= dict(encoder(channels[-len(points) :], width, ffn, inner, fine, named))
    parts |= dict(decoder(width, ffn, layers, classes, heads * sum(points), len(points), fine, named))
    state = {name: _value(name, shape) for name, shape in parts.items()}
    if named:
        scale = torch.tensor([1 / count for count in points for _ in range(count)])
        state |= {
            f"decoder.decoder.layers.{i}.cross_attn.num_points_scale": scale.clone() for i in range(layers)
        }
    if fine:
        for place in ("decoder", "decoder.decoder"):
            state |= {f"{place}.up": torch.tensor([0.5]), f"{place}.reg_scale": torch.tensor([4])}
    return state


def _value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same on every machine and under every version of torch: sines of a running angle."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(3)
    start = zlib.crc32(name.removeprefix("decoder.").encode()) % 10007
    wave = torch.sin((torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + start) ** 2 * 0.37).float()
    wave = wave.reshape(shape)
    if name.endswith("running_var"):
        return 1 + 0.5 * wave
    if len(shape) < 2:
        return 0.2 * wave + 0.7 * name.endswith((".weight", ".scale"))
    gain = GAIN if name.startswith("backbone.st") else 1.6
    return wave * gain / wave[0].numel() ** 0.5


def picture() -> Tensor:
    """(1, 3, 64, 64) in 0..1, as reproducible as the values."""
    return (_value("picture", (1, 3, 64, 64)) * (27**0.5 / 1.6) * 10).sin() / 2 + 0.5
