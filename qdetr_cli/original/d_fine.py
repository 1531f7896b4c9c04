"""Peterande/D-FINE `.pth` files (release and training files) -> transformers.

Names and shapes say all but the number of queries and the way of sampling: heads and sampling points stand in
a buffer, the curve of the box distribution in `up` and `reg_scale`. DEIM writes the same files.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qdetr_cli.original.hybrid import (
    DECODER,
    HYBRID,
    LAYERS,
    Line,
    all_layers,
    heads_by_points,
    points_per_level,
    read_hybrid,
)
from qdetr_cli.original.names import Original, OriginalFile, Renames, State

MARKS = (r"^decoder\.dec_score_head\.0\.weight$", r"^decoder\.decoder\.lqe_layers\.0\.reg_conf\.")
SETTINGS: dict[str, Any] = {"heads": 8, "queries": 300, "decoder_method": "default"}
LQE = f"{DECODER}lqe_layers.0.reg_conf.layers."

NAMES: Renames = (
    *HYBRID,
    (r"^(model\.encoder\.(?:fpn|pan)_blocks\.\d+\.)cv2\.0\.", r"\1csp_rep1."),
    (r"^(model\.encoder\.(?:fpn|pan)_blocks\.\d+\.)cv2\.1\.", r"\1conv2."),
    (r"^(model\.encoder\.(?:fpn|pan)_blocks\.\d+\.)cv3\.0\.", r"\1csp_rep2."),
    (r"^(model\.encoder\.(?:fpn|pan)_blocks\.\d+\.)cv3\.1\.", r"\1conv3."),
    (r"^(model\.encoder\.(?:fpn|pan)_blocks\.\d+\.)cv([14])\.", r"\1conv\2."),
    (r"^(model\.encoder\.downsample_convs\.\d+\.)0\.cv([12])\.", r"\1conv\2."),
    (r"\.linear1\.", ".mlp.layers.0."),
    (r"\.linear2\.", ".mlp.layers.1."),
)


def read_d_fine(file: OriginalFile) -> Original:
    """A D-FINE model. Where the configs say `reg_scale: 4`, files hold an integer; it becomes a float."""
    scales = {name: each.float() for name, each in file.state.items() if name.endswith(".reg_scale")}
    return read_hybrid(replace(file, state=State(file.state.path, file.state | scales)), D_FINE)


def _config(file: OriginalFile, state: State, chosen: Mapping[str, Any]) -> dict[str, Any]:
    points = points_per_level(state)
    block = "model.encoder.fpn_blocks.0."
    return {
        "hidden_expansion": _expansion(state, f"{block}conv2.conv.weight"),
        "depth_mult": state.count(rf"{block}csp_rep1\.bottlenecks\.(\d+)\.") / 3,
        "num_feature_levels": len(points),
        "decoder_n_points": points,
        "decoder_method": chosen["decoder_method"],
        "max_num_bins": state.rows(f"{DECODER}bbox_embed.0.layers.2.weight") // 4 - 1,
        "up": state[f"{DECODER}up"].item(),
        "reg_scale": state[f"{DECODER}reg_scale"].item(),
        "top_prob_values": state[f"{LQE}0.weight"].shape[1] // 4 - 1,
        "lqe_hidden_dim": state.rows(f"{LQE}0.weight"),
        "lqe_layers": state.count(rf"{LQE}(\d+)\."),
    }


def _expansion(state: State, name: str) -> float:
    """The `hidden_expansion` e for which round(e * width // 2) is the width of the block's branches."""
    inner, width = state.rows(name), state.rows("model.encoder_input_proj.0.0.weight")
    exact = 2 * inner / width
    return exact if exact * width // 2 == inner else (2 * inner + 0.5) / width


def _evaluated(state: State) -> tuple[int, str]:
    """Layers wider than the first are auxiliary (`layer_scale`): they follow the one that predicts."""
    layers, _ = all_layers(state)
    width = state.rows(f"{LAYERS}0.self_attn_layer_norm.weight")
    norms = [state.rows(f"{LAYERS}{index}.self_attn_layer_norm.weight") for index in range(layers)]
    return norms.count(width), ": they are wider, so only there for training"


D_FINE = Line(
    family="d_fine",
    renames=NAMES,
    ffn="mlp.layers.0",
    defaults=SETTINGS,
    heads=heads_by_points,
    config=_config,
    evaluated=_evaluated,
    two_names=True,
)
