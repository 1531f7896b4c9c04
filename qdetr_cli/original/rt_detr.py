"""lyuwenyu/RT-DETR `.pth` files, of `rtdetr_pytorch` and `rtdetrv2_pytorch` -> transformers.

Names and shapes say all but the number of queries, the heads (v2 has a buffer that tells them), v2's way of
sampling, and at which decoder layer R50-m stops. Batch norms of the backbone become frozen ones, which is
what transformers' own checkpoints of these models have.
"""

from collections.abc import Mapping
from typing import Any

from qdetr_cli.original.hybrid import (
    HYBRID,
    POINTS,
    Line,
    all_layers,
    heads_by_points,
    points_per_level,
    ratio,
    read_hybrid,
)
from qdetr_cli.original.names import Original, OriginalFile, Renames, State

MARKS = (r"^decoder\.dec_score_head\.0\.weight$", r"^encoder\.fpn_blocks\.0\.bottlenecks\.0\.conv1\.")
V2_MARKS = (*MARKS, r"^decoder\.decoder\.layers\.0\.cross_attn\.num_points_scale$")
SETTINGS: dict[str, Any] = {"heads": 8, "queries": 300}
V2_SETTINGS: dict[str, Any] = {**SETTINGS, "decoder_method": "default"}

NAMES: Renames = (*HYBRID, (r"\.linear([12])\.", r".mlp.fc\1."))
V2_NAMES: Renames = (*NAMES, (r"\.num_points_scale$", ".n_points_scale"))


def read_rt_detr(file: OriginalFile) -> Original:
    """An RT-DETR model."""
    return read_hybrid(file, RT_DETR)


def read_rt_detr_v2(file: OriginalFile) -> Original:
    """An RT-DETRv2 model."""
    return read_hybrid(file, RT_DETR_V2)


def _config(file: OriginalFile, state: State, chosen: Mapping[str, Any]) -> dict[str, Any]:
    levels = state.count(r"model\.decoder_input_proj\.(\d+)\.")
    weights, heads = state.rows(POINTS), chosen["heads"]
    if weights % (heads * levels):
        raise file.fail(
            f"{weights} sampling points are not {heads} heads x {levels} levels; give the right heads"
        )
    return {**_encoder(state), "num_feature_levels": levels, "decoder_n_points": weights // (heads * levels)}


def _v2_config(file: OriginalFile, state: State, chosen: Mapping[str, Any]) -> dict[str, Any]:
    points = points_per_level(state)
    if len(set(points)) > 1:
        raise file.fail(
            f"samples {points} points on its levels; transformers' RT-DETRv2 wants as many on each"
        )
    return {
        **_encoder(state),
        "num_feature_levels": len(points),
        "decoder_n_levels": len(points),
        "decoder_n_points": points[0],
        "decoder_method": chosen["decoder_method"],
    }


def _encoder(state: State) -> dict[str, Any]:
    block = state[
        "model.encoder.fpn_blocks.0.conv1.conv.weight"
    ]  # (part of the width, twice the width, 1, 1)
    return {"hidden_expansion": ratio(block.shape[0], block.shape[1] // 2)}


def _evaluated(state: State) -> tuple[int, str]:
    """R50-m trains six decoder layers and predicts with the third (`eval_idx: 2`); others with the last."""
    layers, why = all_layers(state)
    bottleneck = "model.backbone.model.encoder.stages.0.layers.0.layer.2.convolution.weight" in state
    if bottleneck and layers == 6 and _encoder(state)["hidden_expansion"] < 1:
        return 3, ": R50-m is evaluated after its third (say decoder_layers 6 for all)"
    return layers, why


RT_DETR = Line(
    family="rt_detr",
    renames=NAMES,
    ffn="mlp.fc1",
    defaults=SETTINGS,
    heads=lambda state: None,
    config=_config,
    evaluated=_evaluated,
    two_names=False,
)
RT_DETR_V2 = Line(
    family="rt_detr_v2",
    renames=V2_NAMES,
    ffn="mlp.fc1",
    defaults=V2_SETTINGS,
    heads=heads_by_points,
    config=_v2_config,
    evaluated=_evaluated,
    two_names=True,
)
