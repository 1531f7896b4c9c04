"""facebookresearch/detr `.pth` files (release and training files) -> config and state dict of transformers.

Everything is read from names and shapes but the number of heads and the dilation of the last stage (DC5),
which training files say in `args`. Pre-norm models become Table Transformers, transformers' pre-norm DETR.
"""

from typing import Any

from qdetr_cli.configs import timm_backbone
from qdetr_cli.original.names import Original, OriginalFile, Renames, class_names, labels, rename

# (blocks of layer1..4, bottleneck) -> network, for timm and torchvision, which name and build them alike
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
SETTINGS: dict[str, Any] = {"heads": 8, "dilation": False, "pre_norm": False}  # DETR, arXiv 2005.12872, A.4
BODY = "backbone.0.body."
MARKS = (
    r"^class_embed\.weight$",
    r"^query_embed\.weight$",
    r"^input_proj\.weight$",
    r"^backbone\.0\.body\.conv1\.weight$",
    r"^transformer\.decoder\.layers\.0\.multihead_attn\.in_proj_weight$",
)

COMMON: Renames = (
    (r"^input_proj\.", "model.input_projection."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.encoder\.norm\.", "model.encoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"^(model\.decoder\.layers\.\d+\.)norm2\.", r"\1encoder_attn_layer_norm."),
    (r"^(model\.decoder\.layers\.\d+\.)norm3\.", r"\1final_layer_norm."),
    (r"^(model\.encoder\.layers\.\d+\.)norm2\.", r"\1final_layer_norm."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.multihead_attn\.", ".encoder_attn."),
)
DETR: Renames = (
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^backbone\.1\.row_embed\.", "model.position_embedding.row_embeddings."),
    (r"^backbone\.1\.col_embed\.", "model.position_embedding.column_embeddings."),
    *COMMON,
    (r"\.out_proj\.", ".o_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
)
PRE_NORM: Renames = (
    (r"^backbone\.0\.body\.", "model.backbone.conv_encoder.model."),
    *COMMON,
    (r"\.linear([12])\.", r".fc\1."),
)


def read_detr(file: OriginalFile) -> Original:
    """A facebookresearch/detr model."""
    said = {
        "heads": file.args.get("nheads"),
        "dilation": file.args.get("dilation"),
        "pre_norm": "transformer.encoder.norm.weight" in file.state,  # built for pre-norm only
    }
    chosen, notes = file.settled(said, SETTINGS)
    return Original(
        config=_config(file, **chosen),
        state=rename(file.state, PRE_NORM if chosen["pre_norm"] else DETR),
        notes=notes,
    )


def _config(file: OriginalFile, *, heads: int, dilation: bool, pre_norm: bool) -> dict[str, Any]:
    """The transformers config, from the shapes. The head has one row more than classes, "no object"."""
    state = file.state
    width = state.rows("input_proj.weight")
    if width % heads:
        raise file.fail(f"{heads} heads do not divide the width {width}; give the right heads")
    learned = "backbone.1.row_embed.weight" in state
    if learned and pre_norm:
        raise file.fail("is pre-norm with learned positions, which transformers cannot run")
    return {
        "model_type": "table-transformer" if pre_norm else "detr",
        "d_model": width,
        "num_queries": state.rows("query_embed.weight"),
        "encoder_layers": state.count(r"^transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": state.count(r"^transformer\.decoder\.layers\.(\d+)\."),
        "encoder_ffn_dim": state.rows("transformer.encoder.layers.0.linear1.weight"),
        "decoder_ffn_dim": state.rows("transformer.decoder.layers.0.linear1.weight"),
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "position_embedding_type": "learned" if learned else "sine",
        "auxiliary_loss": False,  # on, transformers computes other predictions than the original
        "dilation": dilation,
        "backbone_config": timm_backbone(
            _backbone(file), out_indices=[1, 2, 3, 4], output_stride=16 if dilation else None
        ),
        **labels(class_names(state.rows("class_embed.weight") - 1)),
    }


def _backbone(file: OriginalFile) -> str:
    """The network's name in timm, from its blocks in each stage."""
    depths = tuple(file.state.count(rf"^backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    bottleneck = f"{BODY}layer1.0.conv3.weight" in file.state
    name = RESNETS.get((depths, bottleneck))
    if name is None:
        raise file.fail(
            f"the backbone has {depths} {'bottleneck' if bottleneck else 'basic'} blocks; known are "
            f"{', '.join(RESNETS.values())}"
        )
    return name
