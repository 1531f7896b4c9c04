"""The table of families: roles of real models, post-processing against transformers, processors."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_detectors import CONFIGS, tiny_config
from torch import nn
from transformers.image_transforms import get_size_with_aspect_ratio

from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import FAMILIES, family_of, post_process, role_of
from qdetr_cli.processors import IMAGENET_MEAN, IMAGENET_STD, Processor
from qdetr_cli.recipe import ROLES


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
    assert wanted - found == set()


def test_the_stem_is_the_smaller_part_of_the_backbone(detector):
    roles = [role_of(detector.family, path) for path in layers(detector)]
    assert 1 <= roles.count("backbone.stem") <= 5 < roles.count("backbone")


def test_attention_and_norm_classes_are_those_of_the_model(detector):
    present = {type(module).__name__ for module in detector.model.modules()}
    family = detector.family
    attentions = {name for name in present if name.endswith("Attention")}
    wrappers = {"MultiScaleDeformableAttention"}  # the sampling inside a deformable attention, no parameters
    wrappers |= {"DabDetrDecoderLayerSelfAttention", "DabDetrDecoderLayerCrossAttention"}  # projections
    assert attentions - wrappers == set(family.attention) | (set(family.deformable) & present)
    assert set(family.deformable) <= present
    assert set(family.frozen_batch_norm) <= present


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
        ("model.decoder.layers.3.encoder_attn.sampling_offsets", "sampling"),
        ("model.decoder.layers.10.gateway.gate", "decoder.other"),
        ("model.decoder.bbox_embed.11.layers.2", "box_head.last"),
        ("model.decoder.bbox_embed.2.layers.1", "box_head"),
        ("model.enc_bbox_head.layers.2", "box_head.last"),
        ("model.enc_score_head", "class_head"),
        ("model.decoder.query_pos_head.layers.0", "query"),
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
}


@pytest.mark.parametrize("name", FAMILIES, ids=str)
def test_post_process_is_that_of_transformers(name):
    generator = torch.Generator().manual_seed(3)
    classes = 6 if FAMILIES[name].softmax else 5
    outputs = SimpleNamespace(
        logits=torch.randn(2, 40, classes, generator=generator),
        pred_boxes=torch.rand(2, 40, 4, generator=generator),
    )
    sizes = torch.tensor([[480, 640], [333, 100]])
    wanted = PROCESSORS[name]().post_process_object_detection(outputs, threshold=-1.0, target_sizes=sizes)
    for ours, theirs in zip(post_process(FAMILIES[name], outputs, sizes), wanted, strict=True):
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
    config = PROCESSORS[name]().to_dict()
    assert Processor.from_config(config, FAMILIES[name].processor) == FAMILIES[name].processor


@pytest.mark.parametrize(
    "config",
    [
        {"resample": 3},
        {"rescale_factor": 1.0},
        {"do_center_crop": True},
        {"size": {"longest_edge": 1333}},
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
