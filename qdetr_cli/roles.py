"""What modules are in a DETR, by in-memory path: tables of (pattern, role), where the first match decides."""

Roles = tuple[tuple[str, str], ...]

HEAD = r"^(?:model\.)?(?:decoder\.)?"
BOX_HEAD = HEAD + r"(?:bbox_predictor|enc_bbox_head|pre_bbox_head|(?:enc_out_)?bbox_embed(?:\.\d+)?)"
ENCODER_LAYER = r"^model\.encoder\.(?:aifi\.\d+\.)?layers\.\d+\."
DECODER_LAYER = r"^model\.decoder\.layers\.\d+\."
CROSS_ATTENTION = DECODER_LAYER + r"(?:encoder_attn|cross_attn)"
POSITION = "decoder.cross_attention.position"  # where coordinates have projections of their own
BACKBONE = r"^model\.(?:backbone|conv_encoder)\.(?:conv_encoder\.)?"
PROJECTOR = (
    r"^model\.backbone\.projector\.(?:scale_layers\.\d+\.)?"  # of ViT features, in place of an encoder
)
STEM = (  # some backbones wrap the network proper once more
    r"(?:(?:swin|focalnet|bit|model)\.)?"
    r"(?:embedder|embeddings|patch_embed|stem|stem_\d+|conv_stem|conv1|bn1)(?:\.|$)"
)

ROLES: Roles = (
    (r"\.(?:sampling_offsets|attention_weights)$", "sampling"),
    (r"^model\.(?:conv_encoder\.)?(?:(?:(?:en|de)coder_)?input_proj|input_projection)(?:\.|$)", "input_proj"),
    (BACKBONE + r"fusion_proj(?:\.|$)", "input_proj"),
    (PROJECTOR + r"projector_layer\.conv1(?:\.|$)", "input_proj"),
    (PROJECTOR, "encoder.conv"),
    (BACKBONE + r"(?:model|backbone)\.(?:_backbone\.)?" + STEM, "backbone.stem"),
    (BACKBONE + r"spatial_tuning_adapter\.stem_conv(?:\.|$)", "backbone.stem"),
    (BACKBONE + r"(?:model|backbone)\.(?:.*\.)?(?:self_)?(?:attention|attn)(?:\.|$)", "backbone.attention"),
    (BACKBONE, "backbone"),
    (
        HEAD + r"(?:class_labels_classifier|(?:enc_out_)?class_embed|enc_score_head|lqe_layers)(?:\.|$)",
        "class_head",
    ),
    (BOX_HEAD + r"\.layers\.2$", "box_head.last"),
    (BOX_HEAD + r"(?:\.|$)", "box_head"),
    (ENCODER_LAYER + r"self_attn(?:\.|$)", "encoder.attention"),
    (ENCODER_LAYER + r"(?:mlp|fc1|fc2)(?:\.|$)", "encoder.ffn"),
    (r"^model\.encoder\.input_proj(?:\.|$)", "input_proj"),
    (
        r"^model\.encoder\.(?:lateral_convs|fpn_blocks?|downsample_convs|down_conv\d|bi_fusion_conv|pan_blocks?)(?:\.|$)",
        "encoder.conv",
    ),
    (r"^model\.encoder(?:\.|$)", "encoder"),
    (DECODER_LAYER + r"self_attn(?:\.|$)", "decoder.self_attention"),
    (CROSS_ATTENTION + r"\.(?:cross_attn_)?(?:q|k|query|key)_pos(?:_sine)?_proj$", POSITION),
    (CROSS_ATTENTION + r"(?:\.|$)", "decoder.cross_attention"),
    (DECODER_LAYER + r"(?:mlp|fc1|fc2)(?:\.|$)", "decoder.ffn"),
    (r"^model\.decoder\.(?:query_scale|query_pos_head|ref_point_head|ref_anchor_head)(?:\.|$)", "query"),
    (r"^model\.(?:query_(?:position|refpoint)_embeddings|reference_points|denoising_class_embed)$", "query"),
    (r"^model\.(?:reference_point_embed|query_feat)$", "query"),
    (r"^model\.(?:pos_trans|weight_embedding)(?:\.|$)", "query"),
    (r"^model\.enc_output(?:\.|$)", "decoder.other"),  # of every token: 2 % of an RT-DETR's work
    (r"^model\.decoder(?:\.|$)", "decoder.other"),
)

YOLOS_ROLES: Roles = (  # a plain ViT is encoder and decoder in one
    (r"^vit\.embeddings\.detection_tokens$", "query"),
    (r"^vit\.embeddings(?:\.|$)", "backbone.stem"),
    (r"^vit\.encoder\.layer\.\d+\.attention(?:\.|$)", "encoder.attention"),
    (r"^vit\.encoder\.layer\.\d+\.(?:intermediate|output)(?:\.|$)", "encoder.ffn"),
    (r"^vit(?:\.|$)", "encoder"),
    *ROLES,
)

LAYOUT_ROLES: Roles = (  # reading order and masks of PP-DocLayout: after the boxes, which alone are measured
    (r"^reading_order(?:\.|$)", "decoder.other"),
    (r"^model\.(?:decoder_order_head|decoder_global_pointer|mask_query_head)(?:\.|$)", "decoder.other"),
    *ROLES,
)
