"""Configs of detectors small enough for tests, one for each family and backbone library."""

from typing import Any

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
PYRAMID = {"out_features": ["stage2", "stage3", "stage4"]}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 4, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [4, 4, 8, 8],
    "stage_out_channels": [8, 16, 16, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [1, 1, 2, 2],
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "use_learnable_affine_block": True,
    "out_indices": [2, 3, 4],
}
TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}
CLASSES = {"id2label": {0: "zebra", 1: "yak", 2: "fox"}, "label2id": {"zebra": 0, "yak": 1, "fox": 2}}
DENSE = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 7,
    "d_model": 16,
    "backbone_config": RESNET,
    **CLASSES,
}
REAL_TIME = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [16, 16, 32],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "num_queries": 7,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 4,
    **CLASSES,
}
RT_DETR_RESNET = {**RESNET, **PYRAMID, "model_type": "rt_detr_resnet"}
DEFORMABLE = {
    **DENSE,
    "model_type": "deformable_detr",
    "d_model": 32,
    "backbone_config": {**RESNET, **PYRAMID},
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
GROUPED = {
    "d_model": 32,
    "num_queries": 7,
    "group_detr": 3,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "c2f_num_blocks": 1,
    **CLASSES,
}
LW_DETR_VIT = {
    **VIT,
    "model_type": "lw_detr_vit",
    "image_size": 64,
    "pretrain_image_size": 64,
    "mlp_ratio": 1,
    "num_windows": 4,
    "window_block_indices": [0],
    "out_indices": [1, 2],
}
RF_DETR_VIT = {
    **VIT,
    "model_type": "rf_detr_dinov2",
    "use_swiglu_ffn": True,
    "image_size": 64,
    "mlp_ratio": 1,
    "num_windows": 2,
    "out_indices": [1, 2],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "detr": {**DENSE, "model_type": "detr"},
    "detr, timm": {**DENSE, "model_type": "detr", "backbone_config": TIMM},
    "conditional_detr": {**DENSE, "model_type": "conditional_detr"},
    "conditional_detr, timm": {**DENSE, "model_type": "conditional_detr", "backbone_config": TIMM},
    "rt_detr": {**REAL_TIME, "model_type": "rt_detr", "backbone_config": RT_DETR_RESNET},
    "rt_detr, timm": {
        **REAL_TIME,
        "model_type": "rt_detr",
        "backbone_config": {**TIMM, "out_indices": [2, 3, 4]},
        "encoder_in_channels": [48, 192, 96],
    },
    "d_fine": {
        **REAL_TIME,
        "model_type": "d_fine",
        "backbone_config": HGNET,
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
    },
    "deimv2": {
        **REAL_TIME,
        "model_type": "deimv2",
        "backbone_config": HGNET,
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
    },
    "rt_detr_v2": {**REAL_TIME, "model_type": "rt_detr_v2", "backbone_config": RT_DETR_RESNET},
    "table-transformer": {**DENSE, "model_type": "table-transformer"},
    "dab-detr": {**DENSE, "model_type": "dab-detr", "hidden_size": 16},
    "deformable_detr": DEFORMABLE,
    "deformable_detr, two-stage": {
        **DEFORMABLE,
        "two_stage": True,
        "with_box_refine": True,
        "two_stage_num_proposals": 7,
    },
    "yolos": {
        **VIT,
        **CLASSES,
        "model_type": "yolos",
        "intermediate_size": 32,
        "image_size": [64, 96],
        "num_detection_tokens": 7,
    },
    "lw_detr": {
        **GROUPED,
        "model_type": "lw_detr",
        "backbone_config": LW_DETR_VIT,
        "projector_scale_factors": [2.0, 0.5],
    },
    "rf_detr": {**GROUPED, "model_type": "rf_detr", "backbone_config": RF_DETR_VIT},
    "deformable_detr-box_refine": {**DEFORMABLE, "with_box_refine": True},
    "rt_detr_v2-discrete": {
        **REAL_TIME,
        "model_type": "rt_detr_v2",
        "backbone_config": RT_DETR_RESNET,
        "decoder_method": "discrete",
    },
    "pp_doclayout_v2": {
        **REAL_TIME,
        "model_type": "pp_doclayout_v2",
        "backbone_config": HGNET,
        "class_thresholds": [0.5, 0.4, 0.3],
        "class_order": [2, 0, 1],
        "reading_order_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_classes": 3,
            "coordinate_size": 3,
            "shape_size": 2,
            "max_position_embeddings": 16,
        },
    },
    "pp_doclayout_v3": {
        **REAL_TIME,
        "model_type": "pp_doclayout_v3",
        "backbone_config": {**HGNET, "out_indices": [1, 2, 3, 4]},
        "num_prototypes": 4,
        "mask_feature_channels": [8, 8],
        "x4_feat_dim": 8,
    },
    "deimv2-lite": {
        **REAL_TIME,
        "model_type": "deimv2",
        "backbone_config": {**HGNET, "out_indices": [3]},
        "encoder_type": "lite",
        "encoder_in_channels": [16],
        "decoder_in_channels": [16, 16],
        "feat_strides": [16, 32],
        "num_feature_levels": 2,
        "use_gateway": False,
        "share_bbox_head": True,
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
    },
    "deimv2-vit": {
        **REAL_TIME,
        "model_type": "deimv2",
        "backbone_config": {
            **VIT,
            "model_type": "dinov3_vit",
            "intermediate_size": 32,
            "image_size": 64,
            "num_register_tokens": 2,
            "use_gated_mlp": True,
            "apply_layernorm": False,
            "out_indices": [0, 1, 2],
            "reshape_hidden_states": True,
        },
        "spatial_tuning_adapter_inplanes": 4,
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
        "encoder_has_trailing_conv": False,
    },
}


def tiny_config(name: str) -> dict[str, Any]:
    """A config.json's content. `CONFIGS` lists the names: a family, some with the backbone or variant."""
    return dict(CONFIGS[name])
