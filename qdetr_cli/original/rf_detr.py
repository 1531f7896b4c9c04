"""roboflow/rf-detr `.pth` files (release and training files) -> transformers.

Files carry the run's `args`, which say what shapes do not: windows, heads, the stages that are used, the
resolution and class names. A file without them is read as the published model with its patch size.
"""

import math
from collections.abc import Mapping
from typing import Any

from qdetr_cli.original.names import Original, OriginalFile, Renames, State, class_names, labels, rename
from qdetr_cli.processors import IMAGENET_MEAN, IMAGENET_STD

MARKS = (r"^backbone\.0\.projector\.stages\.0\.", r"^transformer\.enc_out_class_embed\.0\.weight$")
SETTINGS = ("heads", "windows", "resolution")
PUBLISHED = {
    14: (4, (2, 5, 8, 11), 560),
    16: (2, (3, 6, 9, 12), None),
}  # patch -> windows, stages, resolution
HEAD_WIDTH = 64  # of every DINOv2
VIT = "backbone.0.encoder.encoder."
PROJECTOR = "backbone.0.projector.stages.0."

NAMES: Renames = (
    (r"^backbone\.0\.encoder\.encoder\.", "model.backbone.backbone."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"^backbone\.0\.projector\.stages\.0\.0\.", "model.backbone.projector.projector_layer."),
    (r"^backbone\.0\.projector\.stages\.0\.1\.", "model.backbone.projector.layer_norm."),
    (r"\.projector_layer\.m\.", ".projector_layer.bottlenecks."),
    (r"(\.projector_layer\..*)cv([12])\.", r"\1conv\2."),
    (r"(\.projector_layer\..*)\.bn\.", r"\1.norm."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"^refpoint_embed\.", "model.reference_point_embed."),
    (r"^query_feat\.", "model.query_feat."),
    (r"^(model\.decoder\.layers\.\d+\.)norm1\.", r"\1self_attn_layer_norm."),
    (r"^(model\.decoder\.layers\.\d+\.)norm2\.", r"\1cross_attn_layer_norm."),
    (r"^(model\.decoder\.layers\.\d+\.)norm3\.", r"\1layer_norm."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
)


def read_rf_detr(file: OriginalFile) -> Original:
    """An RF-DETR detector. Raises CheckpointError for variants that transformers cannot run."""
    state = file.state
    if any(name.startswith("segmentation_head.") for name in state):
        raise file.fail("is an RF-DETR for segmentation; qdetr reads detectors")
    if any(
        name.startswith(("backbone.0.projector.stages.1.", "backbone.0.projector.stages_")) for name in state
    ):
        raise file.fail(
            "has feature maps of several scales (projector_scale), as the first RF-DETR Large; transformers' "
            "RF-DETR has one"
        )
    patch = state[f"{VIT}embeddings.patch_embeddings.projection.weight"].shape[-1]
    windows, stages, resolution = PUBLISHED.get(patch, PUBLISHED[16])
    side = patch * math.isqrt(state[f"{VIT}embeddings.position_embeddings"].shape[1] - 1)  # pixels
    said = {
        "heads": file.args.get("sa_nheads"),
        "windows": file.args.get("num_windows"),
        "resolution": file.args.get("resolution"),
    }
    published = {"heads": _width(state) // 32, "windows": windows, "resolution": resolution or side}
    chosen, notes = file.settled(said, published)
    stages = tuple(file.args.get("out_feature_indexes") or stages)
    return Original(
        config=_config(file, chosen["heads"])
        | {"backbone_config": _vit(state, patch, side, chosen["windows"], stages)},
        state=rename(state, NAMES),
        notes=notes,
        processor=_pixels(chosen["resolution"]),
    )


def _width(state: State) -> int:
    return state.rows("transformer.enc_output.0.weight")


def _config(file: OriginalFile, heads: int) -> dict[str, Any]:
    state, width = file.state, _width(file.state)
    groups = state.count(r"^transformer\.enc_output\.(\d+)\.")
    crossing = file.args.get("ca_nheads") or 2 * heads
    points = state.rows("transformer.decoder.layers.0.cross_attn.attention_weights.weight")
    if width % heads or width % crossing or points % crossing:
        raise file.fail(
            f"{heads} heads do not fit the width {width} and {points} points; give the right heads"
        )
    inner = state.rows(f"{PROJECTOR}0.cv1.conv.weight") // 2
    return {
        "model_type": "rf_detr",
        "d_model": width,
        "num_queries": state.rows("refpoint_embed.weight") // groups,
        "group_detr": groups,
        "decoder_layers": state.count(r"^transformer\.decoder\.layers\.(\d+)\."),
        "decoder_ffn_dim": state.rows("transformer.decoder.layers.0.linear1.weight"),
        "decoder_self_attention_heads": heads,
        "decoder_cross_attention_heads": crossing,
        "decoder_n_points": points // crossing,
        "hidden_expansion": inner / width,
        "c2f_num_blocks": state.count(rf"^{PROJECTOR}0\.m\.(\d+)\."),
        "layer_norm_eps": 1e-6,  # of the projector, where transformers has 1e-5 by default
        "dropout": float(file.args.get("dropout") or 0),
        **labels(_names(state.rows("class_embed.weight"), file.args.get("class_names"))),
    }


def _vit(state: State, patch: int, side: int, windows: int, stages: tuple[int, ...]) -> dict[str, Any]:
    width = state[f"{VIT}embeddings.cls_token"].shape[-1]
    return {
        "model_type": "rf_detr_dinov2",
        "hidden_size": width,
        "num_hidden_layers": state.count(rf"^{VIT}encoder\.layer\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "mlp_ratio": state.rows(f"{VIT}encoder.layer.0.mlp.fc1.weight") // width,
        "image_size": side,
        "patch_size": patch,
        "num_windows": windows,
        "out_features": [f"stage{stage}" for stage in stages],
    }


def _names(classes: int, said: Any) -> dict[int, str]:
    """Class names: those of `args`, by category id, or in a row, from 1 on if the head has more rows."""
    if isinstance(said, Mapping):
        known = {int(index): str(name) for index, name in said.items()}
    elif said and len(said) <= classes:
        known = dict(enumerate(map(str, said), start=int(len(said) < classes)))
    else:
        return class_names(classes)
    return {index: known.get(index, "N/A") for index in range(classes)}


def _pixels(resolution: int) -> dict[str, Any]:
    return {
        "size": {"height": resolution, "width": resolution},
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_pad": False,
    }
