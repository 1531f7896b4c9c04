"""Image files of every kind, pixels as transformers' processors make them, augmentation and batches."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from transformers import DetrImageProcessor, RTDetrImageProcessor

from qdetr_cli.boxes import cxcywh_to_xyxy
from qdetr_cli.data import (
    DetectionData,
    ImageError,
    ImageSet,
    Record,
    collate,
    prepare_image,
    read_image,
    same_size_batches,
)
from qdetr_cli.families import Processor
from qdetr_cli.recipe import Augment

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PLAIN = Processor()
SQUARE = Processor(size=(32, 32))


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def record(path, image_id=1, boxes=((2, 2, 12, 8),), crowd=None):
    """The record of an image file, everything of class 1."""
    with Image.open(path) as image:
        width, height = image.size
    count = len(boxes)
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Record(
        image=path,
        image_id=image_id,
        key=path.stem,
        width=width,
        height=height,
        boxes=corners,
        labels=np.ones(count, dtype=np.int64),
        difficult=np.zeros(count, dtype=np.bool_),
        crowd=np.array(crowd or [False] * count, dtype=np.bool_),
        area=(corners[:, 2:] - corners[:, :2]).prod(axis=1),
    )


def data_of(*records):
    return DetectionData(
        kind="voc", root=records[0].image.parent, split="val", class_names=("a", "b"), category_ids=(1, 2),
        records=records,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Six images of two sizes; the last has no object."""
    records = []
    for i, (height, width) in enumerate([(24, 40), (40, 24), (24, 40), (24, 40), (40, 24), (24, 40)]):
        path = tmp_path / f"{i}.png"
        noise(height, width, i).save(path)
        records.append(record(path, i + 1, boxes=() if i == 5 else ((2, 2, 12, 8), (5, 10, 20, 20))))
    return data_of(*records)


# Reading


def gradient():
    """A grey ramp (8, 32) over all of 0..255."""
    return np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (8, 1))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.png", lambda: Image.fromarray(gradient())),
        ("a.png", lambda: Image.fromarray(gradient().astype(np.uint16) * 257)),
        ("a.tif", lambda: Image.fromarray(gradient().astype(np.int32) * 257)),
        ("a.png", lambda: Image.fromarray(gradient()).convert("LA")),
        ("a.png", lambda: Image.fromarray(gradient()).convert("RGBA")),
        ("a.gif", lambda: Image.fromarray(gradient()).convert("P")),
        ("a.bmp", lambda: Image.fromarray(gradient()).convert("RGB")),
        ("a.webp", lambda: Image.fromarray(gradient()).convert("RGB")),
        ("a.jpg", lambda: Image.fromarray(gradient())),
        ("a.jpg", lambda: Image.fromarray(gradient()).convert("RGB").convert("CMYK")),
    ],
    ids=["grey", "16 bit", "32 bit", "grey alpha", "alpha", "palette", "bmp", "webp", "grey jpeg", "cmyk"],
)
def test_modes(tmp_path, name, make):
    make().save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    difference = np.asarray(image).astype(int) - gradient()[:, :, None]
    assert np.abs(difference).max() <= (6 if name.endswith("jpg") else 0)


def test_a_transparent_palette(tmp_path):
    image = Image.fromarray(gradient()).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "a.png").mode == "RGB"


def save_broken(path, kind):
    """An image file that cannot be used."""
    noise(64, 64).save(path)
    whole = path.read_bytes()
    if kind == "real numbers":
        Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path, format="TIFF")
    elif kind == "beyond 16 bit":
        Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(path, format="TIFF")
    else:
        kinds = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello", "flipped": b""}
        path.write_bytes(kinds[kind])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "real numbers", "beyond 16 bit"])
def test_broken_files_are_named(tmp_path, suffix, kind):
    path = tmp_path / f"bad.{suffix}"
    save_broken(path, kind)
    with pytest.raises(ImageError) as raised:
        read_image(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"a\.png: there is no such image file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("limit", [1000, 3000], ids=["error", "warning"])
def test_a_decompression_bomb(tmp_path, monkeypatch, limit):
    noise(64, 64).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match="too large to be decoded safely"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    image, exif = noise(24, 40), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    assert read_image(tmp_path / "a.png").tobytes() == upright.tobytes()
    assert read_image(tmp_path / "a.png", size=(24, 40)).tobytes() == image.tobytes()  # annotated as stored
    if orientation >= 5:
        assert read_image(tmp_path / "a.png", size=(40, 24)).tobytes() == upright.tobytes()
    else:
        with pytest.raises(ImageError, match=r"the image is 40x24 but its annotation says 24x40"):
            read_image(tmp_path / "a.png", size=(40, 24))


def test_broken_metadata_does_no_harm(tmp_path):
    noise(24, 40).save(tmp_path / "a.jpg", exif=b"Exif\0\0not a tiff header at all")
    assert read_image(tmp_path / "a.jpg").size == (40, 24)


# Pixels as transformers has them

SIZES = [(48, 64), (64, 48), (60, 60), (30, 200), (33, 47)]


@pytest.mark.parametrize(("height", "width"), SIZES, ids=str)
def test_prepared_as_detr_does(height, width):
    image = noise(height, width)
    theirs = DetrImageProcessor(size={"shortest_edge": 50, "longest_edge": 90})
    ours = Processor(shortest=50, longest=90, pad=True, **IMAGENET)
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepare_image(image, ours), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES, ids=str)
def test_prepared_as_rt_detr_does(height, width):
    image = noise(height, width)
    expected = RTDetrImageProcessor(size={"height": 40, "width": 56})(images=image, return_tensors="pt")
    prepared = prepare_image(image, Processor(size=(40, 56)))
    torch.testing.assert_close(prepared, expected["pixel_values"][0], atol=1e-6, rtol=0)


def test_without_rescaling():
    image = noise(8, 8)
    ours = Processor(mean=(10.0, 20.0, 30.0), std=(2.0, 2.0, 4.0), rescale=False)
    expected = (np.asarray(image).astype(np.float32) - [10, 20, 30]) / [2, 2, 4]
    np.testing.assert_allclose(prepare_image(image, ours), expected.transpose(2, 0, 1), rtol=1e-6)


def test_a_batch_as_detr_pads_it(data):
    theirs = DetrImageProcessor(size={"shortest_edge": 30, "longest_edge": 100})
    image_set = ImageSet(data, Processor(shortest=30, longest=100, pad=True, **IMAGENET), [0, 1])
    batch = collate([image_set[0], image_set[1]])
    images = [read_image(r.image) for r in data.records[:2]]
    expected = theirs(images=images, return_tensors="pt")
    torch.testing.assert_close(batch.pixel_values, expected["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(batch.pixel_mask, expected["pixel_mask"])
    assert batch.pixel_mask.dtype == torch.int64
    assert torch.equal(batch.sizes, torch.tensor([[24, 40], [40, 24]]))
    assert batch.image_ids == [1, 2]


def test_a_hair_thin_image_keeps_a_pixel():
    assert prepare_image(noise(1, 3000), Processor(shortest=32, longest=64)).shape == (3, 1, 64)


# Samples and batches


def test_labels_are_parts_of_the_image(data):
    sample = ImageSet(data, SQUARE, class_index=[40, 7])[0]  # 24 x 40
    assert sample.size == (24, 40)
    assert sample.labels["class_labels"].tolist() == [7, 7]
    assert sample.labels["class_labels"].dtype == torch.int64
    assert sample.labels["boxes"].dtype == torch.float32
    parts = torch.tensor([[2 / 40, 2 / 24, 12 / 40, 8 / 24], [5 / 40, 10 / 24, 20 / 40, 20 / 24]])
    torch.testing.assert_close(cxcywh_to_xyxy(sample.labels["boxes"]), parts)


def test_crowds_are_no_labels_and_boxes_end_at_the_image(tmp_path):
    noise(20, 20).save(tmp_path / "a.png")
    boxes = [(0, 0, 9, 9), (10, 10, 20.5, 20.5)]
    labels = ImageSet(data_of(record(tmp_path / "a.png", boxes=boxes, crowd=[True, False])), PLAIN, [0, 1])[
        0
    ].labels
    torch.testing.assert_close(labels["boxes"], torch.tensor([[0.75, 0.75, 0.5, 0.5]]))


def test_an_image_without_objects(data):
    labels = ImageSet(data, SQUARE, [0, 1], Augment(flip=1, crop=1, color=0.5))[5].labels
    assert labels["boxes"].shape == (0, 4)
    assert labels["class_labels"].shape == (0,)


def test_padding_to_a_square(data):
    image_set = ImageSet(data, Processor(pad=True, pad_to=64), [0, 1])
    batch = collate([image_set[0]])
    assert batch.pixel_values.shape == (1, 3, 64, 64)
    assert batch.pixel_mask.sum() == 24 * 40
    assert batch.pixel_values[:, :, 24:].abs().max() == 0


def test_to_moves_every_tensor(data):
    batch = collate([ImageSet(data, SQUARE, [0, 1])[0]]).to("meta")
    tensors = [batch.pixel_values, batch.pixel_mask, batch.sizes, *batch.labels[0].values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_same_size_batches_need_no_padding(data):
    batches = list(same_size_batches(ImageSet(data, PLAIN, [0, 1]), [5, 4, 3, 2, 1, 0], batch_size=3))
    assert [batch.image_ids for batch in batches] == [[6, 4, 3], [1], [5, 2]]
    assert all(batch.pixel_mask.all() for batch in batches)


# Changing at random


def same(a, b):
    return torch.equal(a.pixel_values, b.pixel_values) and torch.equal(a.labels["boxes"], b.labels["boxes"])


def test_samples_follow_seed_epoch_and_index(data):
    augment = Augment(flip=0.5, crop=0.5, color=0.4)
    one, other = (ImageSet(data, SQUARE, [0, 1], augment, seed=3) for _ in range(2))
    first = [one[i] for i in range(6)]
    assert all(same(other[i], first[i]) for i in (5, 0, 3, 1, 4, 2))  # in any order
    torch.manual_seed(1)
    assert same(one[2], first[2])  # untouched by the global stream
    one.set_epoch(1)
    assert not all(same(one[i], first[i]) for i in range(6))
    one.set_epoch(0)
    assert same(one[2], first[2])
    assert not all(same(ImageSet(data, SQUARE, [0, 1], augment, seed=4)[i], first[i]) for i in range(6))


def test_flipping_twice_is_nothing(data):
    flipped, plain = ImageSet(data, PLAIN, [0, 1], Augment(flip=1))[0], ImageSet(data, PLAIN, [0, 1])[0]
    assert torch.equal(flipped.pixel_values.flip(-1), plain.pixel_values)
    mirrored = flipped.labels["boxes"] * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
    torch.testing.assert_close(mirrored, plain.labels["boxes"])


@pytest.mark.parametrize("flip", [0.0, 1.0], ids=["crop", "crop and flip"])
def test_boxes_follow_the_pixels(tmp_path, flip):
    """A white rectangle on black: its box, found again in the pixels, is the label."""
    pixels = np.zeros((50, 60, 3), dtype=np.uint8)
    pixels[20:35, 15:40] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image_set = ImageSet(data_of(record(tmp_path / "a.png", boxes=[(15, 20, 40, 35)])), PLAIN, [0, 1])
    image_set.augment = Augment(crop=1, flip=flip)
    shapes = set()
    for epoch in range(20):
        image_set.set_epoch(epoch)
        sample = image_set[0]
        height, width = sample.pixel_values.shape[-2:]
        shapes.add((height, width))
        rows, columns = (sample.pixel_values[0] > 0.5).nonzero(as_tuple=True)
        found = [
            columns.min() / width,
            rows.min() / height,
            (columns.max() + 1) / width,
            (rows.max() + 1) / height,
        ]
        torch.testing.assert_close(cxcywh_to_xyxy(sample.labels["boxes"])[0], torch.stack(found))
    assert len(shapes) > 10
    assert min(h for h, _ in shapes) >= 30


def test_boxes_that_a_crop_cuts_off_are_gone(tmp_path):
    noise(100, 100).save(tmp_path / "a.png")
    boxes = [(0, 0, 3, 3), (97, 97, 100, 100), (40, 40, 60, 60)]
    image_set = ImageSet(data_of(record(tmp_path / "a.png", boxes=boxes)), PLAIN, [0, 1], Augment(crop=1))
    counts = set()
    for epoch in range(10):
        image_set.set_epoch(epoch)
        labels = image_set[0].labels
        assert len(labels["boxes"]) == len(labels["class_labels"])
        corners = cxcywh_to_xyxy(labels["boxes"])
        assert corners.min() > -1e-6
        assert corners.max() < 1 + 1e-6
        counts.add(len(labels["boxes"]))
    assert min(counts) < 3


def test_colour_leaves_boxes_alone(data):
    changed, plain = ImageSet(data, PLAIN, [0, 1], Augment(color=0.5))[0], ImageSet(data, PLAIN, [0, 1])[0]
    assert torch.equal(changed.labels["boxes"], plain.labels["boxes"])
    assert not torch.equal(changed.pixel_values, plain.pixel_values)
    assert changed.pixel_values.min() >= 0
    assert changed.pixel_values.max() <= 1


def test_scales_of_a_shortest_side(data):
    processor = Processor(shortest=24, longest=60)
    image_set = ImageSet(data, processor, [0, 1], Augment(scales=(12, 48)))
    sizes = {tuple(sample.pixel_values.shape[-2:]) for sample in image_set.__getitems__(range(6))}
    assert sizes <= {(12, 20), (20, 12), (36, 60), (60, 36)}  # 48 would make the longest 80
    assert len(sizes) > 1
    assert dataclasses.replace(processor, shortest=48).output_size(24, 40) == (36, 60)


def test_scales_of_a_square_hold_for_a_batch(data):
    image_set = ImageSet(data, SQUARE, [0, 1], Augment(scales=(16, 24, 32)))
    sides = set()
    for epoch in range(12):
        image_set.set_epoch(epoch)
        batch = collate(image_set.__getitems__(range(6)))
        assert batch.pixel_mask.all()
        sides.add(batch.pixel_values.shape[-1])
    assert sides == {16, 24, 32}


def test_workers_see_the_epoch_and_one_message(data):
    """Persistent workers, as training has them: the same samples as without, errors that stay clear."""
    image_set = ImageSet(data, SQUARE, [0, 1], Augment(flip=0.5, crop=0.5))
    loader = DataLoader(image_set, batch_size=3, num_workers=1, persistent_workers=True, collate_fn=collate)
    for epoch in (0, 1):
        image_set.set_epoch(epoch)
        for batch, start in zip(loader, (0, 3), strict=True):
            expected = collate([image_set[i] for i in range(start, start + 3)])
            assert torch.equal(batch.pixel_values, expected.pixel_values)
    data.records[4].image.write_bytes(b"")
    with pytest.raises(ImageError) as raised:
        list(loader)
    assert str(raised.value).startswith(f"{data.records[4].image}: cannot be read as an image")
    assert "Traceback" not in str(raised.value)
