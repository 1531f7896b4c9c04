"""An exported file as a detector: its classes, what its images become, and batches of any size."""

import dataclasses
import json

import pytest
import torch
from exported_files import PADDED, SQUASHED, metadata, write_file
from PIL import Image
from torch import nn

from qdetr_cli import artefact
from qdetr_cli.artefact import Canvas, FileRunner, Shrinking, for_inputs, open_artefact
from qdetr_cli.data import prepare_image
from qdetr_cli.errors import ExportError, PluginError
from qdetr_cli.families import DETR_PIXELS
from qdetr_cli.processors import Processor
from qdetr_cli.sessions import Inputs

SUFFIXES = pytest.mark.parametrize("suffix", [".onnx", ".xml"])
MASK = torch.zeros(1, dtype=torch.int64).numpy().dtype


def inputs(size: tuple[int, int] | None, *, mask: bool = True) -> Inputs:
    return Inputs(batch=None, size=size, mask=MASK if mask else None)


# --- the size of images ---


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ((480, 640), (800, 1066)),  # as the family does
        ((640, 480), (1066, 800)),
        ((100, 1000), (133, 1333)),
    ],
    ids=["landscape", "portrait", "wide"],
)
def test_an_image_that_fits_is_what_the_family_makes_of_it(image, wanted):
    processor = for_inputs(DETR_PIXELS, inputs((1333, 1333)))
    assert processor.output_size(*image) == DETR_PIXELS.output_size(*image) == wanted


@pytest.mark.parametrize(
    ("image", "within", "wanted"),
    [
        ((480, 640), (640, 640), (480, 640)),
        ((640, 480), (640, 640), (640, 480)),
        ((480, 640), (640, 960), (640, 853)),
        ((640, 480), (640, 960), (640, 480)),
        ((2, 2000), (640, 640), (1, 640)),
    ],
    ids=["landscape", "portrait", "wide file", "portrait in a wide file", "hair-thin"],
)
def test_an_image_that_does_not_fit_is_shrunk_with_its_ratio(image, within, wanted):
    processor = for_inputs(DETR_PIXELS, inputs(within))
    assert processor.output_size(*image) == wanted


@pytest.mark.parametrize("size", [(640, 640), (608, 800), (64, 1024), (333, 517)], ids=str)
def test_no_image_passes_the_file(size):
    processor = for_inputs(dataclasses.replace(DETR_PIXELS, divisor=16), inputs(size))
    for image in [(1, 1), (10, 3000), (3000, 10), (799, 801), (333, 517), (4000, 3000)]:
        height, width = processor.output_size(*image)
        assert height <= size[0]
        assert width <= size[1]
        assert height % 16 == width % 16 == 0


def test_a_family_that_squashes_gets_the_size_of_the_file():
    processor = for_inputs(SQUASHED, inputs((96, 128)))
    assert processor == dataclasses.replace(SQUASHED, size=(96, 128))


def test_a_file_without_a_mask_gets_no_padding():
    processor = for_inputs(DETR_PIXELS, inputs((96, 128), mask=False))
    assert processor.output_size(480, 640) == (96, 128)
    assert processor.mean == DETR_PIXELS.mean


def test_a_file_of_any_size_gets_what_the_family_makes():
    assert for_inputs(DETR_PIXELS, inputs(None)) is DETR_PIXELS


def test_all_else_of_the_processor_is_kept():
    processor = dataclasses.replace(PADDED, bicubic=True, mean=(0.1, 0.2, 0.3), antialias=False)
    made = for_inputs(processor, inputs((64, 96)))
    assert isinstance(made, Shrinking)
    kept = {field.name: getattr(made, field.name) for field in dataclasses.fields(Processor)}
    assert Processor(**kept) == processor


# --- the canvas ---


class Seen(nn.Module):
    def forward(self, pixel_values, pixel_mask):
        return pixel_values, pixel_mask


def test_the_canvas_pads_at_the_right_and_below_and_masks_it():
    pixels = torch.rand(2, 3, 5, 7)
    mask = torch.ones(2, 5, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    seen, masked = Canvas(Seen(), (8, 9))(pixel_values=pixels, pixel_mask=mask)
    assert seen.shape == (2, 3, 8, 9)
    assert torch.equal(seen[..., :5, :7], pixels)
    assert seen.sum() == pytest.approx(float(pixels.sum()))
    assert torch.equal(masked[:, :5, :7], mask)
    assert masked.sum() == mask.sum()


def test_a_canvas_of_any_size_changes_nothing():
    pixels, mask = torch.rand(2, 3, 5, 7), torch.ones(2, 5, 7)
    seen, masked = Canvas(Seen(), None)(pixel_values=pixels, pixel_mask=mask)
    assert seen is pixels
    assert masked is mask


# --- files ---


@SUFFIXES
@pytest.mark.parametrize("fixed", [1, 2, 3, 5, "batch"], ids=str)
def test_any_number_of_images_runs_in_a_file_of_a_fixed_number(tmp_path, suffix, fixed):
    path = write_file(tmp_path / f"m{suffix}", batch=fixed, told=metadata())
    detector = open_artefact(path, threads=1).detector
    pixels = torch.rand(3, 3, 40, 50)
    mask = torch.ones(3, 40, 50, dtype=torch.int64)
    mask[1, 20:] = 0
    found = detector.model(pixel_values=pixels, pixel_mask=mask)
    assert found.logits.shape == (3, 2, 11)
    torch.testing.assert_close(found.logits[:, 0, 0], pixels.sum((1, 2, 3)), rtol=1e-5, atol=1e-2)
    assert found.logits[:, 0, 1].tolist() == [2000, 1000, 2000]
    assert found.pred_boxes.shape == (3, 2, 4)


def test_a_session_as_a_module_needs_no_canvas_for_any_size(tmp_path):
    path = write_file(tmp_path / "m.onnx", size=("h", "w"), told=metadata(size=None))
    artefact = open_artefact(path, threads=1)
    assert isinstance(artefact.detector.model.model, FileRunner)
    found = artefact.detector.model(pixel_values=torch.ones(1, 3, 32, 70), pixel_mask=torch.ones(1, 32, 70))
    assert found.logits[0, 0, :2].tolist() == [3 * 32 * 70, 32 * 70]


@SUFFIXES
def test_a_file_knows_its_classes_family_and_processor(tmp_path, suffix):
    names = {0: "cat", 5: "dog"}
    path = write_file(tmp_path / f"m{suffix}", told=metadata(class_names=names))
    detector = open_artefact(path, threads=1).detector
    assert (detector.family.name, detector.class_names, detector.source) == ("detr", names, str(path))
    image = Image.new("RGB", (200, 100), (255, 0, 51))
    found = prepare_image(image, detector.processor)
    assert found.shape == (3, 48, 96)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


@SUFFIXES
def test_a_foreign_file_is_refused(tmp_path, suffix):
    path = write_file(tmp_path / f"m{suffix}")
    with pytest.raises(ExportError, match=r"qdetr did not write it; write it with `qdetr export`"):
        open_artefact(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "Expecting property name"),
        ("[1]", "schema None"),
        ('{"schema": 99}', "schema 99; this qdetr reads schema 1"),
        ('{"schema": 1}', "missing keys"),
        (json.dumps(json.loads(metadata().to_json()) | {"size": [1]}), "size .1. is not"),
        (json.dumps(json.loads(metadata().to_json()) | {"class_names": {"x": "y"}}), "invalid literal"),
        (json.dumps(json.loads(metadata().to_json()) | {"class_names": [1]}), "class_names: of the"),
        (json.dumps(json.loads(metadata().to_json()) | {"processor": {"size": "x"}}), "attribute"),
    ],
    ids=["no json", "list", "newer", "incomplete", "half a size", "no index", "class list", "processor"],
)
def test_damaged_metadata_is_refused(tmp_path, text, fault):
    path = write_file(tmp_path / "m.onnx", told=text)
    with pytest.raises(ExportError, match=f"its qdetr metadata cannot be read .*{fault}"):
        open_artefact(path)


def test_a_family_of_a_plugin_is_named(tmp_path):
    path = write_file(tmp_path / "m.onnx", told=metadata(family="detr", source="x"))
    mine = write_file(tmp_path / "n.onnx", told=dataclasses.replace(metadata(), family="mine"))
    assert open_artefact(path).detector.family.name == "detr"
    with pytest.raises(PluginError, match="is of the family mine, which a plugin brings"):
        open_artefact(mine)


@pytest.mark.parametrize(
    ("portable", "recipe", "overflow"),
    [(False, {"schema": 1}, True), (True, {"schema": 1}, False), (False, None, False)],
    ids=["int8", "portable", "float"],
)
def test_an_integer_file_that_is_not_portable_may_overflow(tmp_path, monkeypatch, portable, recipe, overflow):
    path = write_file(tmp_path / "m.onnx", told=metadata(portable=portable, recipe=recipe))
    monkeypatch.setattr(artefact, "sums_overflow", lambda: True)
    assert open_artefact(path).may_overflow == overflow
    monkeypatch.setattr(artefact, "sums_overflow", lambda: False)
    assert not open_artefact(path).may_overflow


def test_metadata_of_files_from_before_there_were_portable_ones():
    content = json.loads(metadata().to_json())
    del content["portable"]
    assert type(metadata()).from_json(json.dumps(content)) == metadata(portable=False)


def test_metadata_is_complete_json_on_one_line():
    text = metadata().to_json()
    assert "\n" not in text
    assert type(metadata()).from_json(text) == metadata()
    assert metadata().quantized
    assert not metadata(recipe=None).quantized
