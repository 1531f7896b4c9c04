"""Pixels, targets and boxes of each family against transformers' image processor, on an odd size."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_detectors import CONFIGS, tiny_config
from transformers.models.yolos.image_processing_yolos import get_size_with_aspect_ratio_yolos

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.data import DetectionData, ImageSet, Record, collate
from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import FAMILIES, post_process
from qdetr_cli.processors import IMAGENET_MEAN, IMAGENET_STD, Processor

ASPECT = {"size": {"shortest_edge": 96, "longest_edge": 160}}
SQUARE = {"size": {"height": 64, "width": 96}}
IMAGENET = {"do_normalize": True, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
THEIRS = {  # the class that transformers, or the family's published checkpoints, use
    "detr": ("DetrImageProcessor", ASPECT),
    "conditional_detr": ("ConditionalDetrImageProcessor", ASPECT),
    "dab-detr": ("ConditionalDetrImageProcessor", ASPECT),
    "table-transformer": ("DetrImageProcessor", ASPECT),
    "deformable_detr": ("DeformableDetrImageProcessor", ASPECT),
    "yolos": ("YolosImageProcessor", ASPECT),
    "lw_detr": ("DeformableDetrImageProcessor", {**SQUARE, **IMAGENET, "do_pad": False}),
    "rf_detr": ("RfDetrImageProcessor", {**SQUARE, **IMAGENET, "do_pad": False}),
    "rt_detr": ("RTDetrImageProcessor", SQUARE),
    "rt_detr_v2": ("RTDetrImageProcessor", SQUARE),
    "d_fine": ("RTDetrImageProcessor", SQUARE),
    "deimv2": ("RTDetrImageProcessor", SQUARE),
    "pp_doclayout_v2": ("PPDocLayoutV2ImageProcessor", SQUARE),
    "pp_doclayout_v3": ("PPDocLayoutV3ImageProcessor", SQUARE),
}
HEIGHT, WIDTH = 61, 83
BOXES = [(3.5, 4.0, 40.25, 59.0), (50.0, 10.0, 83.0, 30.5)]  # xyxy


@pytest.fixture(params=[name for name in CONFIGS if name in FAMILIES], ids=str)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One image of 61 x 83 pixels of noise, with two objects and a crowd."""
    path = tmp_path_factory.mktemp("odd") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    corners = np.array([*BOXES, (0, 0, 9, 9)], dtype=np.float64)
    record = Record(
        image=path,
        image_id=7,
        key="a",
        width=WIDTH,
        height=HEIGHT,
        boxes=corners,
        labels=np.array([0, 2, 1]),
        difficult=np.zeros(3, dtype=np.bool_),
        crowd=np.array([False, False, True]),
        area=(corners[:, 2:] - corners[:, :2]).prod(axis=1),
    )
    return DetectionData(
        kind="coco",
        root=path.parent,
        split="val",
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
        records=(record,),
    )


def theirs_of(name):
    kind, options = THEIRS[name]
    return getattr(transformers, kind)(**options)


def ours_of(name):
    """What qdetr reads from the file that transformers writes for its processor."""
    content = theirs_of(name).to_dict()
    return load_config_model(tiny_config(name), content)


def target_of(data):
    (record,) = data.records
    annotations = [
        {
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "category_id": int(label),
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for (x0, y0, x1, y1), label, area, crowd in zip(
            record.boxes.tolist(), record.labels, record.area, record.crowd, strict=True
        )
    ]
    return {"image_id": 7, "annotations": annotations}


def test_every_family_is_compared():
    assert set(THEIRS) == set(FAMILIES)


def test_pixels_are_those_of_transformers(name, data):
    theirs = theirs_of(name)
    with Image.open(data.records[0].image) as image:
        expected = theirs(images=image.convert("RGB"), return_tensors="pt")
    batch = collate([ImageSet(data, ours_of(name).processor, [0, 1, 2])[0]])
    assert batch.pixel_values.shape == expected["pixel_values"].shape
    assert batch.pixel_values.shape[-2:] != (HEIGHT, WIDTH)
    torch.testing.assert_close(batch.pixel_values, expected["pixel_values"], rtol=0, atol=1e-5)
    assert batch.pixel_mask.all()


def test_targets_are_those_of_transformers(name, data):
    theirs = theirs_of(name)
    (sample,) = ImageSet(data, ours_of(name).processor, [0, 1, 2]).__getitems__([0])
    if name.startswith("pp_doclayout"):  # it takes no targets, as it has no loss
        expected = {"boxes": sample.labels["boxes"], "class_labels": torch.tensor([0, 2])}
    else:
        with Image.open(data.records[0].image) as image:
            made = theirs(images=image.convert("RGB"), annotations=target_of(data), return_tensors="pt")
        (expected,) = made["labels"]
    assert torch.equal(sample.labels["class_labels"], expected["class_labels"])
    torch.testing.assert_close(sample.labels["boxes"], expected["boxes"], rtol=0, atol=1e-6)


def test_boxes_come_back_on_original_pixels(name, data):
    """A detector that answers with the targets gives the annotated boxes, whatever was done to the image."""
    detector = ours_of(name)
    batch = collate([ImageSet(data, detector.processor, [0, 1, 2])[0]])
    (target,) = batch.labels
    logits = torch.full((1, 2, 4 if detector.family.softmax else 3), -9.0)
    logits[0, torch.arange(2), target["class_labels"]] = torch.tensor([9.0, 8.0])
    outputs = transformers.utils.ModelOutput(logits=logits, pred_boxes=target["boxes"][None])
    (found,) = post_process(detector.family, outputs, batch.sizes)
    best = found.scores.argsort(descending=True)[:2]
    assert found.labels[best].tolist() == [0, 2]
    torch.testing.assert_close(found.boxes[best], torch.tensor(BOXES), rtol=0, atol=1e-4)


def test_what_is_read_is_written_and_read_again(name):
    made = ours_of(name).processor
    assert Processor.from_config(made.to_config()) == made


def test_without_a_file_the_model_can_take_the_images(name, data):
    detector = load_config_model(tiny_config(name), None)
    height, width = detector.processor.output_size(HEIGHT, WIDTH)
    step = detector.family.divisible(detector.model.config)
    assert (height % step, width % step) == (0, 0)
    assert detector.processor.divisor % step == 0


# --- sizes ---


def test_sides_are_multiples_as_in_yolos():
    ours = Processor(shortest=512, longest=864, divisor=16)
    generator = np.random.default_rng(0)
    for height, width in generator.integers(100, 2000, (500, 2)):
        expected = get_size_with_aspect_ratio_yolos((int(height), int(width)), 512, 864)
        assert ours.output_size(int(height), int(width)) == expected


def test_a_side_is_never_cut_to_nothing():
    assert Processor(shortest=20, longest=40, divisor=16).output_size(10, 900) == (16, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": {"height": 60, "width": 64}}, "size 60x64: this model needs multiples of 32"),
        ({"size": {"height": 64, "width": 64}, "pad_size": {"height": 80, "width": 80}}, "pad_size 80: this"),
    ],
    ids=["size", "pad_size"],
)
def test_sizes_that_the_model_cannot_divide_are_refused(content, message):
    with pytest.raises(CheckpointError, match=message):
        load_config_model(tiny_config("lw_detr"), content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"size": 512, "max_size": 864}, {"shortest": 512, "longest": 864}),
        ({"size": {"longest_edge": 1000}}, {"shortest": 800, "longest": 1000}),
        ({"size": {"shortest_edge": 700}, "max_size": 900}, {"shortest": 700, "longest": 900}),
        ({"do_resize": False}, {"shortest": None, "longest": None}),
        ({"resample": 3}, {"bicubic": True}),
        ({"pad_and_return_pixel_mask": False}, {"pad": False}),
    ],
    ids=["numbers", "longest alone", "old longest", "no resizing", "bicubic", "old padding"],
)
def test_old_and_partial_files(content, expected):
    made = load_config_model(tiny_config("detr"), content).processor
    assert {key: getattr(made, key) for key in expected} == expected
