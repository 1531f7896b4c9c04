"""Model folders, data sets and commands that are done in a second, for tests of whole commands."""

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_detectors import CONFIGS, tiny_config
from typer.testing import CliRunner

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.cli import app
from qdetr_cli.families import family_of
from qdetr_cli.report import Page
from qdetr_cli.results import Listener

DIGITS = tuple("0123456789")
PADDED = {"size": {"shortest_edge": 64, "longest_edge": 96}}
SQUASHED = {"size": {"height": 64, "width": 64}}
SQUASHING = tuple(name for name, config in CONFIGS.items() if family_of(config["model_type"]).squash)
FAST = [
    "calibrate.images=4",
    "train.steps=2",
    "train.batch_size=2",
    "train.workers=0",
    "train.ema=0.9",
]
SETS = [word for each in FAST for word in ("--set", each)]


def write_model(
    folder: Path,
    name: str = "detr",
    classes: Sequence[str] = DIGITS,
    *,
    padded: dict[str, Any] = PADDED,
    squashed: dict[str, Any] = SQUASHED,
) -> Path:
    """A Hugging Face folder with a tiny detector of random weights, and the processor of its kind."""
    torch.manual_seed(0)
    names = dict(enumerate(classes))
    config = tiny_config(name) | {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    detector = load_config_model(config, squashed if name in SQUASHING else padded)
    detector.model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(detector.processor.to_config()))
    return folder


def write_coco(folder: Path, sizes: Sequence[tuple[int, int]] = ((80, 60), (60, 90), (64, 64))) -> Path:
    """A COCO root with the classes "cat" (id 3) and "dog" (id 7), and images (width, height) of `sizes`."""
    for split in ("train", "val"):
        images, annotations = [], []
        (folder / split).mkdir(parents=True)
        for number, (width, height) in enumerate(sizes, start=1):
            name = f"{split}{number}.png"
            Image.new("RGB", (width, height), (40 * number, 90, 20)).save(folder / split / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            box = [5.0, 6.0, 30.0, 20.0 + number]
            annotations.append(
                {"id": number, "image_id": number, "category_id": 3 + 4 * (number % 2), "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        }
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def write_voc(folder: Path, classes: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Path:
    """A VOC root: an image (width, height) of each of `sizes` for training and one for measuring.

    Image n has n % 3 objects; every class has one in an annotation that no split names.
    """
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    turn = cycle(classes)
    for split in ("train", "val"):
        names = [f"{split}{number}" for number in range(1, len(sizes) + 1)]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for number, (name, size) in enumerate(zip(names, sizes, strict=True), start=1):
            Image.new("RGB", size, (40 * number, 90, 20)).save(folder / "JPEGImages" / f"{name}.jpg")
            boxes = [(5 + 20 * each, 6, 24 + 20 * each, 30 + number) for each in range(number % 3)]
            _write_annotation(folder, name, size, [(next(turn), box) for box in boxes])
    _write_annotation(folder, "unused", (9, 9), [(each, (1, 1, 5, 5)) for each in classes])
    return folder


def _write_annotation(folder: Path, name: str, size: tuple[int, int], objects: Sequence[Any]) -> None:
    sides = "<size><width>{}</width><height>{}</height><depth>3</depth></size>".format(*size)
    found = "".join(
        f"<object><name>{each}</name><bndbox>"
        + "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>".format(*box)
        + "</bndbox></object>"
        for each, box in objects
    )
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{sides}{found}</annotation>")


def write_original(path: Path, classes: int = 10) -> Path:
    """An original DETR file of the size of the tests, with its args, ready for `classes`."""
    from argparse import Namespace

    from original_detr import random_detr

    told = Namespace(nheads=4, dilation=False, pre_norm=False, backbone="resnet18")
    torch.save({"model": random_detr(classes=classes, layers=(1, 1)).state_dict(), "args": told}, path)
    return path


def qdetr(*arguments: object) -> Any:
    """The result of a command: exit_code, stdout and stderr. A defect of ours is raised as it is."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def ok(*arguments: object) -> Any:
    """The result of a command that must succeed."""
    result = qdetr(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def as_json(*arguments: object) -> dict[str, Any]:
    """The one JSON object that a command with --json prints."""
    content: dict[str, Any] = json.loads(ok(*arguments, "--json").stdout)
    return content


def refused(*arguments: object) -> str:
    """The one message of a command that must refuse: exit code 2, and no traceback."""
    result = qdetr(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr)
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return message


class Told(Page):
    """A listener that keeps what is said."""

    def __init__(self) -> None:
        super().__init__(json=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def listener() -> Listener:
    """Somebody who is told, where nobody asks what."""
    return Told()
