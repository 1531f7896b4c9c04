"""Digit scenes on disk, as a VOC root and as a COCO root: `python -m qdetr_cli.scene_files OUT`."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from qdetr_cli.errors import DataError
from qdetr_cli.scenes import CLASS_NAMES, Digit, Split, area, scene

_SMALLEST = 32  # side of an image


def write_scenes(
    out: Path,
    *,
    train: int = 6000,
    val: int = 500,
    size: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the data set under `out` twice, as a VOC root `out/voc` and as a COCO root `out/coco`.

    `progress` is called after each image with the number written so far. `out` appears only when complete.
    Raises DataError when `out` has content, or a number makes no sense.
    """
    _check(out, train, val, size, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        images = chain(
            _write_split(draft, "train", train, size, seed), _write_split(draft, "val", val, size, seed)
        )
        for written, _ in enumerate(images, start=1):
            if progress is not None:
                progress(written)
        if out.exists():
            out.rmdir()  # empty, see _check
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check(out: Path, train: int, val: int, size: int, seed: int) -> None:
    faults = [f"{name}: {n} is not 1 or more" for name, n in (("train", train), ("val", val)) if n < 1]
    if size < _SMALLEST:
        faults.append(f"size: {size} is not {_SMALLEST} or more")
    if seed < 0:
        faults.append(f"seed: {seed} is not 0 or more")
    if out.is_dir() and any(out.iterdir()):
        faults.append(f"{out} is not empty: name a new folder, or remove it first")
    elif out.exists() and not out.is_dir():
        faults.append(f"{out} is a file: name a new folder")
    if faults:
        raise DataError("digit scenes cannot be written:\n" + "\n".join(f"  {fault}" for fault in faults))


def _write_split(root: Path, split: Split, count: int, size: int, seed: int) -> Iterator[Path]:
    """Write one split under both roots; yield each image once it is there. The lists come last."""
    voc, coco = root / "voc", root / "coco"
    for folder in (
        "voc/Annotations",
        "voc/JPEGImages",
        "voc/ImageSets/Main",
        "coco/annotations",
        f"coco/{split}",
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        drawn = scene(index, split=split, size=size, seed=seed)
        stem = f"{split}_{index:06d}"
        picture = voc / "JPEGImages" / f"{stem}.png"
        Image.fromarray(drawn.image).save(picture, compress_level=1)
        _link(picture, coco / split / picture.name)
        (voc / "Annotations" / f"{stem}.xml").write_text(_voc_xml(stem, size, drawn.digits), encoding="utf-8")
        images.append({"id": index + 1, "file_name": picture.name, "width": size, "height": size})
        annotations += (_coco_annotation(index + 1, digit) for digit in drawn.digits)
        yield picture
    stems = "".join(f"{split}_{index:06d}\n" for index in range(count))
    (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(stems, encoding="utf-8")
    instances = _coco_json(images, annotations)
    (coco / "annotations" / f"instances_{split}.json").write_text(instances, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Give `source` a second name; copy it where the file system knows no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _voc_xml(stem: str, size: int, digits: tuple[Digit, ...]) -> str:
    """The VOC annotation of one image. VOC counts pixels from 1 and includes the last one."""
    objects = "".join(
        f"  <object>\n    <name>{CLASS_NAMES[digit.label]}</name>\n"
        f"    <difficult>{digit.difficult:d}</difficult>\n"
        f"    <bndbox><xmin>{digit.box[0] + 1}</xmin><ymin>{digit.box[1] + 1}</ymin>"
        f"<xmax>{digit.box[2]}</xmax><ymax>{digit.box[3]}</ymax></bndbox>\n  </object>\n"
        for digit in digits
    )
    return (
        f"<annotation>\n  <filename>{stem}.png</filename>\n"
        f"  <size><width>{size}</width><height>{size}</height><depth>3</depth></size>\n"
        f"{objects}</annotation>\n"
    )


def _coco_annotation(image_id: int, digit: Digit) -> dict[str, Any]:
    """One COCO annotation without its id; `difficult` is an extra key that COCO readers ignore."""
    left, top, right, bottom = digit.box
    return {
        "image_id": image_id,
        "category_id": digit.label + 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": area(digit.box),
        "iscrowd": 0,
        "difficult": int(digit.difficult),
    }


def _coco_json(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> str:
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
    numbered = [{"id": i + 1, **annotation} for i, annotation in enumerate(annotations)]
    return json.dumps({"images": images, "annotations": numbered, "categories": categories})


if __name__ == "__main__":
    import typer

    def main(out: Path, train: int = 6000, val: int = 500, size: int = 64, seed: int = 0) -> None:
        """Write the digit scenes to OUT, as a VOC root (OUT/voc) and as a COCO root (OUT/coco)."""
        try:
            write_scenes(out, train=train, val=val, size=size, seed=seed)
        except DataError as fault:
            typer.echo(fault, err=True)
            raise typer.Exit(2) from None

    typer.run(main)
