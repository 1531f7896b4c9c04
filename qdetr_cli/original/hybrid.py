"""What RT-DETR and D-FINE files share: a hybrid encoder, queries from the image, a head for every layer."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qdetr_cli.original.backbones import BACKBONES, backbone_config
from qdetr_cli.original.names import Original, OriginalFile, Renames, State, class_names, labels, rename

DERIVED = r"^(?:decoder\.(?:anchors|valid_mask)|encoder\.pos_embed\d+)$"  # follow from the image size
STRIDES = (4, 8, 16, 32)
METHODS = ("default", "discrete")
DECODER = "model.decoder."
LAYERS = f"{DECODER}layers."
POINTS = f"{LAYERS}0.encoder_attn.attention_weights.weight"
AIFI = "model.encoder.aifi.0.layers."

HYBRID: Renames = (
    *BACKBONES,
    (r"^encoder\.input_proj\.(\d+)\.conv\.", r"encoder.input_proj.\1.0."),
    (r"^encoder\.input_proj\.(\d+)\.norm\.", r"encoder.input_proj.\1.1."),
    (r"^encoder\.input_proj\.", "model.encoder_input_proj."),
    (r"^encoder\.encoder\.", "model.encoder.aifi."),
    (r"^encoder\.", "model.encoder."),
    (r"^decoder\.input_proj\.(\d+)\.conv\.", r"model.decoder_input_proj.\1.0."),
    (r"^decoder\.input_proj\.(\d+)\.norm\.", r"model.decoder_input_proj.\1.1."),
    (r"^decoder\.enc_output\.proj\.", "decoder.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "decoder.enc_output.1."),
    (r"^decoder\.(?=enc_|denoising_class_embed\.)", "model."),
    (r"^decoder\.dec_score_head\.", f"{DECODER}class_embed."),
    (r"^decoder\.dec_bbox_head\.", f"{DECODER}bbox_embed."),
    (r"^decoder\.(?:decoder\.)?", DECODER),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.layers\.(\d+)\.norm1\.", r".layers.\1.self_attn_layer_norm."),
    (r"^(model\.decoder\.layers\.\d+\.)norm2\.", r"\1encoder_attn_layer_norm."),
    (r"^(model\.encoder\.aifi\.\d+\.layers\.\d+\.)norm2\.", r"\1final_layer_norm."),
    (r"\.layers\.(\d+)\.norm3\.", r".layers.\1.final_layer_norm."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One family of the line: how its names differ, and what it reads in addition."""

    family: str  # transformers' model_type
    renames: Renames
    ffn: str  # the first layer of a feed-forward block, in memory
    defaults: Mapping[str, Any]  # what shapes may not say, as the published models have it
    heads: Callable[[State], int | None]  # None: the file does not say
    config: Callable[[OriginalFile, State, Mapping[str, Any]], dict[str, Any]]  # of (file, state, settings)
    evaluated: Callable[[State], tuple[int, str]]  # decoder layers that predict, and why not all of them
    two_names: bool  # transformers has the heads in the decoder and in the detector


def read_hybrid(file: OriginalFile, line: Line) -> Original:
    """A model of the line. Raises CheckpointError for variants that transformers cannot run."""
    if "decoder.tgt_embed.weight" in file.state:
        raise file.fail("has learned query contents (decoder.tgt_embed), which transformers cannot run")
    state = rename(file.state.without(DERIVED), line.renames)
    if state.rows("model.enc_score_head.weight") != state.rows(f"{DECODER}class_embed.0.weight"):
        raise file.fail("selects queries by a class-agnostic score, which transformers cannot do")
    chosen, notes = file.settled({"heads": line.heads(state)}, line.defaults)
    if chosen.get("decoder_method", "default") not in METHODS:
        raise file.fail(f"decoder_method {chosen['decoder_method']!r} is not one of {', '.join(METHODS)}")
    state, left_out = _evaluated(file, state, line)
    return Original(
        config={
            "model_type": line.family,
            **_config(file, state, chosen, line.ffn),
            **line.config(file, state, chosen),
        },
        state=_with_both_heads(state) if line.two_names else state,
        notes=(*left_out, *notes),
    )


def all_layers(state: State) -> tuple[int, str]:
    """Every decoder layer, for no reason but that it is there."""
    return state.count(rf"{LAYERS}(\d+)\."), ""


def points_per_level(state: State) -> list[int]:
    """Sampling points of each level from the buffer that holds 1/n for each of a level's n points."""
    scale = next(each for name, each in state.items() if name.endswith("points_scale")).tolist()
    points = []
    while scale:
        points.append(round(1 / scale[0]))
        scale = scale[points[-1] :]
    return points


def heads_by_points(state: State) -> int:
    """Heads of the decoder: each has one attention weight for every sampling point."""
    return state.rows(POINTS) // sum(points_per_level(state))


def ratio(part: int, whole: int) -> float:
    """The ratio whose product with `whole`, cut to an integer, is `part`."""
    found = part / whole
    return found if int(whole * found) == part else math.nextafter(found, math.inf)


def _evaluated(file: OriginalFile, state: State, line: Line) -> tuple[State, tuple[str, ...]]:
    """(the state without decoder layers after the one that predicts, a note on them)."""
    there, _ = all_layers(state)
    layers, why = line.evaluated(state)
    if (said := file.settings.get("decoder_layers")) is not None:
        layers, why = said, ""
    if not 1 <= layers <= there:
        raise file.fail(f"has {there} decoder layers; decoder_layers {layers} is not from 1 to {there}")
    if layers == there:
        return state, ()
    later = "|".join(str(index) for index in range(layers, there))
    kept = state.without(rf"^model\.decoder\.(?:layers|class_embed|bbox_embed|lqe_layers)\.(?:{later})\.")
    return kept, (f"decoder layers {layers + 1} to {there} are left out{why}",)


def _with_both_heads(state: State) -> State:
    again = {
        name.removeprefix(DECODER): tensor
        for name, tensor in state.items()
        if name.startswith((f"{DECODER}class_embed.", f"{DECODER}bbox_embed."))
    }
    return State(state.path, state | again)


def _config(file: OriginalFile, state: State, chosen: Mapping[str, Any], ffn: str) -> dict[str, Any]:
    """What the configs of the line share."""
    heads = chosen["heads"]
    inputs = _numbered(state, "model.encoder_input_proj.{}.0.weight")  # (D, channels, 1, 1)
    encoder, width = inputs[0].shape[0], state.rows("model.enc_output.0.weight")
    for part, size in (("encoder", encoder), ("decoder", width)):
        if size % heads:
            raise file.fail(f"{heads} heads do not divide the {part}'s width {size}; give the right heads")
    levels = len(inputs)
    attended = state.count(r"model\.encoder\.aifi\.(\d+)\.")  # levels with attention: the smallest maps
    return {
        "encoder_hidden_dim": encoder,
        "encoder_in_channels": [tensor.shape[1] for tensor in inputs],
        "feat_strides": list(STRIDES[-levels:]),
        "encode_proj_layers": list(range(levels - attended, levels)),
        "encoder_layers": state.count(rf"{AIFI}(\d+)\."),
        "encoder_ffn_dim": state.rows(f"{AIFI}0.{ffn}.weight"),
        "encoder_attention_heads": heads,
        "d_model": width,
        "decoder_in_channels": _decoder_inputs(state, levels, encoder),
        "decoder_layers": state.count(rf"{LAYERS}(\d+)\."),
        "decoder_ffn_dim": state.rows(f"{LAYERS}0.{ffn}.weight"),
        "decoder_attention_heads": heads,
        "num_queries": chosen["queries"],
        "num_denoising": 100 if "model.denoising_class_embed.weight" in state else 0,
        "backbone_config": backbone_config(file, state, levels),
        **labels(class_names(state.rows("model.enc_score_head.weight"))),
    }


def _decoder_inputs(state: State, levels: int, encoder: int) -> list[int]:
    """Channels that the decoder's projections take; D-FINE has none where they equal its width."""
    inputs = _numbered(state, "model.decoder_input_proj.{}.0.weight")
    return [tensor.shape[1] for tensor in inputs[:levels]] or [encoder] * levels


def _numbered(state: State, name: str) -> list[Tensor]:
    """The tensors that `name` names with 0, 1, ... in its place."""
    names = (name.format(index) for index in itertools.count())
    return [state[name] for name in itertools.takewhile(state.__contains__, names)]
