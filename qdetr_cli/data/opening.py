"""From a path to a data set: recognising VOC and COCO."""

import glob
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from qdetr_cli.data.coco import read_coco
from qdetr_cli.data.images import ImageError, check_header
from qdetr_cli.data.records import DetectionData, refuse
from qdetr_cli.data.voc import read_voc
from qdetr_cli.errors import DataError

_FORMS = (
    "A data set is a VOC root (Annotations/, JPEGImages/, ImageSets/Main/), "
    "a COCO root (annotations/instances_*.json and image folders) or a COCO json with --images."
)


def open_data(
    path: str | Path, *, split: str = "val", images: Path | None = None, classes: Sequence[str] | None = None
) -> DetectionData:
    """The records of one split of a VOC root, a COCO root, or a COCO json (whose name is then the split).

    `images` names the image folder where it is not the usual one. `classes` fixes the names and their order,
    such as those of a checkpoint or of the training split; else VOC takes the sorted names of the whole root,
    COCO its categories by id. Raises DataError, one message with every fault of a kind, for

    - an unknown or empty split, a missing image or annotation, an image that is listed twice;
    - a broken XML or JSON, an entity or document type in an XML, a number that is not finite;
    - an unknown image or category id, a class that `classes` lacks, two categories of one name;
    - a file name that leaves its folder.

    Counted in `warnings` instead: boxes that stick out by more than half a pixel are clipped, boxes without
    area in the image are dropped, a size that the annotation lacks is read from the image. Images without
    objects are kept. Images themselves are read when they are used; `check_images` looks at all of them.
    """
    path = Path(path).expanduser()
    _check_classes(classes)
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: there is no such image folder. Correct --images.")
    if path.is_file():
        if path.suffix.lower() != ".json":
            raise DataError(f"{path}: is a file, but no .json. {_FORMS}")
        folders = [images] if images else _folders_near(path)
        return read_coco(path, root=path.parent, split=path.stem, folders=folders, classes=classes)
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder or file. {_FORMS}")
    return _open_root(path, split, images, classes)


def check_images(data: DetectionData) -> None:
    """Raise one DataError that lists the image files that are broken or differ from their annotated size.

    Reads headers alone, some 5,000 images a second: for before a long run.
    """
    faults = []
    for record in data.records:
        try:
            check_header(record.image, (record.height, record.width))
        except ImageError as fault:
            faults.append(str(fault))
    refuse(f"{data.root}: images of split {data.split} cannot be used:", faults)


def _open_root(root: Path, split: str, images: Path | None, classes: Sequence[str] | None) -> DetectionData:
    voc = (root / "Annotations").is_dir() and any((root / "Annotations").rglob("*.xml"))
    files = sorted((root / "annotations").glob("*.json")) if (root / "annotations").is_dir() else []
    if voc and files:
        raise DataError(f"{root}: has VOC annotations and COCO files. Name the json, such as {files[0]}.")
    if voc or (root / "ImageSets" / "Main").is_dir():
        return read_voc(root, split=split, images=images, classes=classes)
    if files:
        file = _instances(root, files, split)
        folders = [images] if images else _split_folders(root, file, split)
        return read_coco(file, root=root, split=split, folders=folders, classes=classes)
    raise DataError(f"{root}: is neither a VOC nor a COCO root. {_FORMS}{_inner(root)}")


def _check_classes(classes: Sequence[str] | None) -> None:
    if classes is not None:
        twice = [name for name, count in Counter(classes).items() if count > 1]
        refuse("classes have the same name:", twice, "Give each class of the model a name of its own.")


def _inner(root: Path) -> str:
    """The subfolders that are roots themselves, as VOCdevkit/VOC2007 is, as a way out."""
    marks = ("Annotations", "annotations")
    found = [folder for folder in sorted(root.iterdir()) if any((folder / mark).is_dir() for mark in marks)]
    return f" Did you mean {' or '.join(map(str, found[:4]))}?" if found else ""


def _instances(root: Path, files: Sequence[Path], split: str) -> Path:
    """annotations/instances_<split>.json, or the one that begins so (`val` finds instances_val2017)."""
    named = [file for file in files if file.stem.startswith("instances_")]
    splits = {file.stem.removeprefix("instances_"): file for file in named}
    if split in splits:
        return splits[split]
    begin = [name for name in splits if re.fullmatch(re.escape(split) + r"[\d_.-]*", name)]
    if len(begin) == 1:
        return splits[begin[0]]
    found = ", ".join(begin or splits) or f"none among {', '.join(file.name for file in files)}"
    what = "more than one split begins so" if begin else "there is no such split"
    where = root / "annotations" / f"instances_{split}*.json"
    raise DataError(f"{where}: {what}. Splits found: {found}. Name one with --split.")


def _split_folders(root: Path, file: Path, split: str) -> list[Path]:
    """Where the images of a COCO root may lie: <split>*/, images/<split>*/, images/, ..."""
    name = file.stem.removeprefix("instances_")
    below = [name, f"images/{name}", split, f"images/{split}", "images", f"{name}/images", "."]
    begin = [path for base in (root, root / "images") for path in sorted(base.glob(f"{glob.escape(split)}*"))]
    return _existing(dict.fromkeys([*(root / folder for folder in below), *begin]))


def _folders_near(file: Path) -> list[Path]:
    """Where the images of a lone json may lie: beside it, or where a COCO root has them."""
    name = file.stem.removeprefix("instances_")
    bases = (file.parent, file.parent.parent)
    return _existing([base / below for base in bases for below in (".", "images", name, f"images/{name}")])


def _existing(folders: Iterable[Path]) -> list[Path]:
    return [folder for folder in folders if folder.is_dir()]
