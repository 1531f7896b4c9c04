"""The table of families: roles of real models, post-processing against transformers, processors."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_detectors import CONFIGS, tiny_config
from torch import nn
from transformers.image_transforms import get_size_with_aspect_ratio

from qdetr_cli.backbones import DENSE_ATTENTION
from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import FAMILIES, REFUSED, family_of, post_process, role_of
from qdetr_cli.processors import IMAGENET_MEAN, IMAGENET_STD, Processor
from qdetr_cli.recipe import ROLES
from qdetr_cli.recording import recording_size


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def detector(request):
    return load_config_model(tiny_config(request.param), None)


def layers(detector: Detector) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return [path for path, module in detector.model.named_modules() if isinstance(module, kinds)]


def test_every_layer_has_a_role(detector):
    without = [path for path in layers(detector) if role_of(detector.family, path) not in ROLES]
    positions = [path for path in without if "position_embedding" in path]
    assert without == positions


def test_every_family_has_the_roles_of_a_detector(detector):
    found = {role_of(detector.family, path) for path in layers(detector)}
    wanted = {"backbone.stem", "backbone", "input_proj", "decoder.self_attention", "decoder.cross_attention"}
    wanted |= {"encoder.ffn", "encoder.attention", "decoder.ffn", "class_head", "box_head", "box_head.last"}
    if detector.family.name in ("d_fine", "deimv2"):
        wanted -= {"decoder.cross_attention"}  # only sampling offsets and weights, no projections
    if detector.family.name == "yolos":  # one ViT is all there is
        wanted = {"backbone.stem", "query"} | {
            role for role in wanted if role.startswith(("enc", "cl", "box"))
        }
        found |= {role_of(detector.family, path) for path, _ in detector.model.named_parameters()}
    elif detector.family.query_groups:  # the ViT is the encoder, a convolutional projector follows
        wanted = wanted - {"encoder.attention", "encoder.ffn"} | {"backbone.attention", "encoder.conv"}
    elif detector.model.config.to_dict().get("encoder_type") == "lite":
        wanted = wanted - {"encoder.attention", "encoder.ffn"} | {"encoder.conv"}
    assert wanted - found == set()


def test_positions_of_cross_attention_have_a_role_where_they_have_layers(detector):
    """q_pos_sine and k_pos of every decoder layer and q_pos of the first, in the two families with them."""
    found = [
        path
        for path in layers(detector)
        if role_of(detector.family, path) == "decoder.cross_attention.position"
    ]
    apart = detector.family.name in ("conditional_detr", "dab-detr")
    assert len(found) == (2 * detector.model.config.decoder_layers + 1 if apart else 0)


def test_the_stem_is_the_smaller_part_of_the_backbone(detector):
    roles = [role_of(detector.family, path).split(".") for path in layers(detector)]
    body = [role for role in roles if role[0] == "backbone" and role != ["backbone", "stem"]]
    if detector.family.name == "yolos":
        body = [role for role in roles if role[0] == "encoder"]
    assert 1 <= roles.count(["backbone", "stem"]) <= 5 < len(body)


def test_attention_and_norm_classes_are_those_of_the_model(detector):
    present = {type(module).__name__ for module in detector.model.modules()}
    family = detector.family
    attentions = {name for name in present if name.endswith("Attention")}
    wrappers = {"MultiScaleDeformableAttention"}  # the sampling inside a deformable attention, no parameters
    wrappers |= {"DabDetrDecoderLayerSelfAttention", "DabDetrDecoderLayerCrossAttention"}  # projections
    wrappers |= {"YolosAttention", "PPDocLayoutV2ReadingOrderAttention"}  # with the projection of the output
    own = {name for name in attentions - wrappers if name not in DENSE_ATTENTION}
    dense = set(family.attention) & present
    assert own == dense | set(family.deformable)
    assert dense == set(family.attention) or detector.model.config.to_dict().get("encoder_type") == "lite"
    assert set(family.deformable) <= present
    vit = getattr(detector.model.config, "backbone_config", None).__class__.__name__ == "DINOv3ViTConfig"
    assert vit or set(family.frozen_batch_norm) <= present


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.backbone.model.conv1", "backbone.stem"),
        ("model.backbone.model._backbone.conv1.0", "backbone.stem"),
        ("model.backbone.model.layer1.0.conv1", "backbone"),
        ("model.backbone.conv_encoder.model.embedder.embedder.convolution", "backbone.stem"),
        ("model.encoder.layers.3.self_attn", "encoder.attention"),
        ("model.encoder.layers.3.self_attn.q_proj", "encoder.attention"),
        ("model.encoder.layers.3.self_attn_layer_norm", "encoder"),
        ("model.decoder.layers.3.encoder_attn", "decoder.cross_attention"),
        ("model.decoder.layers.3.encoder_attn.k_content_proj", "decoder.cross_attention"),
        ("model.decoder.layers.0.encoder_attn.q_pos_proj", "decoder.cross_attention.position"),
        ("model.decoder.layers.3.encoder_attn.k_pos_proj", "decoder.cross_attention.position"),
        ("model.decoder.layers.3.encoder_attn.q_pos_sine_proj", "decoder.cross_attention.position"),
        ("model.decoder.layers.3.self_attn.q_pos_proj", "decoder.self_attention"),
        ("model.decoder.layers.3.encoder_attn.sampling_offsets", "sampling"),
        ("model.decoder.layers.10.gateway.gate", "decoder.other"),
        ("model.enc_output.0", "decoder.other"),
        ("model.decoder.bbox_embed.11.layers.2", "box_head.last"),
        ("model.decoder.bbox_embed.2.layers.1", "box_head"),
        ("model.enc_bbox_head.layers.2", "box_head.last"),
        ("model.enc_score_head", "class_head"),
        ("model.decoder.query_pos_head.layers.0", "query"),
        ("model.backbone.backbone.embeddings.patch_embeddings.projection", "backbone.stem"),
        ("model.backbone.backbone.encoder.layer.11.attention.q_proj", "backbone.attention"),
        ("model.backbone.backbone.encoder.layer.11.attention", "backbone.attention"),
        ("model.backbone.backbone.encoder.layer.11.mlp.fc1", "backbone"),
        ("model.backbone.projector.projector_layer.conv1.conv", "input_proj"),
        ("model.backbone.projector.projector_layer.bottlenecks.0.conv1.conv", "encoder.conv"),
        ("model.backbone.projector.scale_layers.1.sampling_layers.0.layers.0", "encoder.conv"),
        ("model.backbone.projector.scale_layers.1.projector_layer.conv1.conv", "input_proj"),
        ("model.conv_encoder.backbone.model.layer.3.attention.o_proj", "backbone.attention"),
        ("model.conv_encoder.spatial_tuning_adapter.stem_conv.conv", "backbone.stem"),
        ("model.conv_encoder.spatial_tuning_adapter.conv4.conv", "backbone"),
        ("model.conv_encoder.fusion_proj.2.conv", "input_proj"),
        ("model.encoder.input_proj.0.conv", "input_proj"),
        ("model.encoder.bi_fusion_conv.conv", "encoder.conv"),
        ("model.enc_out_bbox_embed.12.layers.2", "box_head.last"),
        ("model.enc_out_class_embed.12", "class_head"),
        ("model", ""),
    ],
    ids=str,
)
def test_role_of_a_path(path, role):
    assert role_of(FAMILIES["d_fine"], path) == role


PROCESSORS = {
    "detr": transformers.DetrImageProcessor,
    "table-transformer": transformers.DetrImageProcessor,
    "conditional_detr": transformers.ConditionalDetrImageProcessor,
    "dab-detr": transformers.ConditionalDetrImageProcessor,
    "deformable_detr": transformers.DeformableDetrImageProcessor,
    "rt_detr": transformers.RTDetrImageProcessor,
    "rt_detr_v2": transformers.RTDetrImageProcessor,
    "d_fine": transformers.RTDetrImageProcessor,
    "deimv2": transformers.RTDetrImageProcessor,
    "yolos": transformers.YolosImageProcessor,
    "lw_detr": transformers.DeformableDetrImageProcessor,  # as transformers' auto class has it
    "rf_detr": transformers.RfDetrImageProcessor,
    "pp_doclayout_v2": transformers.PPDocLayoutV2ImageProcessor,
    "pp_doclayout_v3": transformers.PPDocLayoutV2ImageProcessor,  # its own gives polygons besides, from masks
}


@pytest.mark.parametrize("name", FAMILIES, ids=str)
def test_post_process_is_that_of_transformers(name):
    generator = torch.Generator().manual_seed(3)
    classes = 6 if FAMILIES[name].softmax else 5
    outputs = SimpleNamespace(
        logits=torch.randn(2, 40, classes, generator=generator),
        pred_boxes=torch.rand(2, 40, 4, generator=generator),
        order_logits=torch.zeros(2, 40, 40),
    )
    sizes = torch.tensor([[480, 640], [333, 100]])
    wanted = PROCESSORS[name]().post_process_object_detection(outputs, threshold=-1.0, target_sizes=sizes)
    for ours, theirs in zip(post_process(FAMILIES[name], outputs, sizes), wanted, strict=True):
        if "order_seq" in theirs:  # in reading order
            best = theirs["scores"].argsort(descending=True)
            theirs = {key: theirs[key][best] for key in ("scores", "labels", "boxes")}
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=0)
        assert ours.labels.tolist() == theirs["labels"].tolist()
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=1e-6, atol=1e-4)


def test_top_k_is_cut_where_there_are_fewer_pairs():
    outputs = SimpleNamespace(logits=torch.zeros(1, 3, 2), pred_boxes=torch.rand(1, 3, 4))
    (found,) = post_process(FAMILIES["conditional_detr"], outputs, torch.tensor([[10, 10]]), top_k=100)
    assert found.scores.shape == (6,)
    assert found.boxes.shape == (6, 4)


def test_boxes_are_pixels_of_the_original():
    outputs = SimpleNamespace(logits=torch.zeros(1, 1, 2), pred_boxes=torch.tensor([[[0.5, 0.25, 0.5, 0.5]]]))
    (found,) = post_process(FAMILIES["detr"], outputs, torch.tensor([[100, 200]]))
    assert found.boxes.tolist() == [[50, 0, 150, 50]]


def test_an_unknown_family_is_named_with_the_known_ones():
    with pytest.raises(CheckpointError, match=r"'bert' is not a detector.*conditional_detr.*d_fine"):
        family_of("bert")


@pytest.mark.parametrize("name", REFUSED)
def test_a_detector_that_is_refused_says_why(name):
    assert name in transformers.CONFIG_MAPPING
    with pytest.raises(CheckpointError, match=r"is not supported: it finds .*; supported: .*detr"):
        family_of(name)
    assert family_of("detr").name == "detr"


def test_no_detector_of_transformers_is_forgotten():
    """What transformers lists for object detection is a family or refused for a reason."""
    listed = set(transformers.models.auto.modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)
    assert listed - set(FAMILIES) - set(REFUSED) == set()


@pytest.mark.parametrize(
    ("name", "multiple"),
    [("yolos", 16), ("lw_detr", 32), ("rf_detr", 32), ("rt_detr", 32), ("detr", 1)],
    ids=str,
)
def test_sides_are_multiples(name, multiple):
    config = load_config_model(tiny_config(name), None).model.config
    assert FAMILIES[name].divisible(config) == multiple


@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if not row.fixed_queries])
def test_noise_for_recording_has_a_cell_for_every_query(name):
    """With as many queries as real checkpoints have: 300 are chosen, which a small image does not hold."""
    config = load_config_model(tiny_config(name), None).model.config
    config.num_queries = config.two_stage_num_proposals = 300
    height, width = recording_size(FAMILIES[name], config)
    stride, multiple = FAMILIES[name].finest_stride(config), FAMILIES[name].divisible(config)
    assert height != width
    assert height % multiple == width % multiple == 0
    assert 300 <= (height // stride) * (width // stride) < 1200


IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@pytest.mark.parametrize(
    ("family", "config", "wanted"),
    [
        ("detr", {}, Processor(shortest=800, longest=1333, pad=True, **IMAGENET)),
        ("rt_detr", {}, Processor(size=(640, 640))),
        (
            "detr",
            {"size": {"shortest_edge": 480, "longest_edge": 600}, "do_pad": False},
            Processor(shortest=480, longest=600, **IMAGENET),
        ),
        ("detr", {"size": 512, "max_size": 864}, Processor(shortest=512, longest=864, pad=True, **IMAGENET)),
        ("detr", {"size": {"height": 96, "width": 128}}, Processor(size=(96, 128), pad=True, **IMAGENET)),
        ("rt_detr", {"size": 320}, Processor(size=(320, 320))),
        ("rt_detr", {"size": [96, 128]}, Processor(size=(96, 128))),
        (
            "detr",
            {"do_normalize": False, "image_mean": [0.4] * 3, "pad_and_return_pixel_mask": False},
            Processor(shortest=800, longest=1333),
        ),
        ("rt_detr", {"do_normalize": True}, Processor(size=(640, 640), **IMAGENET)),
        (
            "rt_detr",
            {"do_normalize": False, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)},
            Processor(size=(640, 640)),
        ),
        ("detr", {"do_resize": False, "do_rescale": False}, Processor(rescale=False, pad=True, **IMAGENET)),
        (
            "detr",
            {"pad_size": {"height": 700, "width": 700}},
            Processor(shortest=800, longest=1333, pad=True, pad_to=700, **IMAGENET),
        ),
    ],
)
def test_processor_from_config_and_back(family, config, wanted):
    processor = Processor.from_config(config, FAMILIES[family].processor)
    assert processor == wanted
    assert Processor.from_config(processor.to_config()) == wanted


@pytest.mark.parametrize("name", FAMILIES, ids=str)
def test_fallback_is_the_default_of_transformers(name):
    """But for LW-DETR and RF-DETR, whose classes keep the aspect while their checkpoints are for squares."""
    config = PROCESSORS[name]().to_dict()
    if name in ("lw_detr", "rf_detr"):
        height, width = FAMILIES[name].processor.size
        config |= {"size": {"height": height, "width": width}, "do_pad": False}
    assert Processor.from_config(config, FAMILIES[name].processor) == FAMILIES[name].processor


@pytest.mark.parametrize(
    "config",
    [
        {"resample": 1},
        {"rescale_factor": 1.0},
        {"do_center_crop": True},
        {"size": {"max_height": 1333, "max_width": 1333}},
        {"pad_size": {"height": 1, "width": 2}},
    ],
    ids=str,
)
def test_a_processor_that_cannot_be_followed_is_refused(config):
    with pytest.raises(CheckpointError, match=next(iter(config)).removeprefix("do_")):
        Processor.from_config(config, FAMILIES["detr"].processor)


def test_output_size_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    for shortest, longest in ((800, 1333), (64, 96), (480, 600)):
        processor = Processor(shortest=shortest, longest=longest)
        for height, width in torch.randint(8, 2000, (400, 2), generator=generator).tolist():
            wanted = get_size_with_aspect_ratio((height, width), shortest, longest)
            assert processor.output_size(height, width) == wanted, (height, width)


def test_output_size_without_resizing_or_squashed():
    assert Processor().output_size(3, 5) == (3, 5)
    assert Processor(size=(64, 96)).output_size(3, 5) == (64, 96)
    assert Processor(shortest=100).output_size(50, 200) == (100, 400)
