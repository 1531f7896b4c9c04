"""Reading COCO: instances_*.json with images, annotations and categories, and the folder of its images."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr
from typing import Any

from qdetr_cli.data.images import image_size
from qdetr_cli.data.records import (
    NO_SIZE,
    DetectionData,
    Folder,
    Record,
    Target,
    make_record,
    near,
    refuse,
    safe_relative,
)
from qdetr_cli.errors import DataError

UNUSED = "categories left out: the model or the training split lacks them, and no object is of them"
_WAY_OUT = "Correct the file."


def read_coco(
    path: Path, *, root: Path, split: str, folders: Sequence[Path], classes: Sequence[str] | None
) -> DetectionData:
    """The data of the file `path`, its images in the first of `folders` that holds them; see `open_data`."""
    content = _content(path)
    tally: Counter[str] = Counter()
    images = _checked_images(path, content["images"])
    names, index, ids = _classes(path, content, classes, tally)
    targets = _targets(path, content["annotations"], {image["id"] for image in images}, index)
    folder = _image_folder(path, images, folders)
    return DetectionData(
        kind="coco",
        root=root,
        split=split,
        class_names=names,
        category_ids=ids,
        records=tuple(_record(image, folder, targets[image["id"]], tally) for image in images),
        warnings={what: count for what, count in tally.items() if count},
    )


def _content(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The parsed file, checked to be three lists of objects under the names that COCO gives them."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise DataError(f"{path}: cannot be read as JSON ({fault}). Correct or replace it.") from None
    if isinstance(content, list):
        raise DataError(f"{path}: holds a list, as a file of detections does. Name the file of annotations.")
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no object with images, annotations and categories. Name a COCO file.")
    faults = [
        f"{key!r} is not a list of objects" if key in content else f"{key!r} is missing"
        for key in ("images", "annotations", "categories")
        if not (isinstance(content.get(key), list) and all(isinstance(entry, dict) for entry in content[key]))
    ]
    refuse(f"{path}: is not a COCO file of objects:", faults, _WAY_OUT)
    return content


def _checked_images(path: Path, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images, each with a whole `id` of its own and a `file_name` that stays in its folder."""
    if not images:
        raise DataError(f"{path}: the split has no image.")
    faults = []
    for i, image in enumerate(images):
        if not _whole(image.get("id")):
            faults.append(f"images[{i}]: id {image.get('id')!r} is not a whole number")
        if not (isinstance(image.get("file_name"), str) and image["file_name"]):
            faults.append(f"images[{i}]: file_name {image.get('file_name')!r} is not a name")
    refuse(f"{path}: images cannot be used:", faults, _WAY_OUT)
    for key in ("id", "file_name"):
        _refuse_twice(f"{path}: images have the same {key}:", [image[key] for image in images])
    for image in images:
        image["file_name"] = safe_relative(image["file_name"], f"{path}, image {image['id']}")
    return images


def _classes(
    path: Path, content: dict[str, list[dict[str, Any]]], classes: Sequence[str] | None, tally: Counter[str]
) -> tuple[tuple[str, ...], dict[int, int], tuple[int, ...]]:
    """Class names, category id -> class index, and the category id of each class.

    Sorted by id, or in the order of `classes`; a class that the file lacks gets an id that it does not use.
    """
    names = _category_names(path, content["categories"])
    if classes is None:
        return tuple(names.values()), {id_: i for i, id_ in enumerate(names)}, tuple(names)
    used = {entry["category_id"] for entry in content["annotations"] if _whole(entry.get("category_id"))}
    strange = {id_: name for id_, name in names.items() if name not in classes}
    refuse(f"{path}: objects are of classes that the model or the training split does not have:",
           [f"{name!r}{near(name, classes)}" for id_, name in strange.items() if id_ in used],
           f"Known classes: {', '.join(classes)}. Rename them, or train with these classes.")  # fmt: skip
    tally[UNUSED] += len(strange)
    known = {name: id_ for id_, name in names.items()}
    free = max(names, default=0) + 1
    ids = tuple(known.get(name, free + i) for i, name in enumerate(classes))
    return tuple(classes), {known[name]: i for i, name in enumerate(classes) if name in known}, ids


def _category_names(path: Path, categories: list[dict[str, Any]]) -> dict[int, str]:
    """Category id -> name, by id."""
    faults = [
        f"categories[{i}]: id {c.get('id')!r} is not a whole number or name {c.get('name')!r} is not a text"
        for i, c in enumerate(categories)
        if not (_whole(c.get("id")) and isinstance(c.get("name"), str) and c["name"].strip())
    ]
    if not categories:
        faults.append("there is none")
    refuse(f"{path}: categories cannot be used:", faults, _WAY_OUT)
    for key in ("id", "name"):
        _refuse_twice(f"{path}: categories have the same {key}:", [category[key] for category in categories])
    return {category["id"]: category["name"] for category in sorted(categories, key=lambda c: int(c["id"]))}


def _targets(
    path: Path, annotations: list[dict[str, Any]], image_ids: set[int], index: dict[int, int]
) -> defaultdict[int, list[Target]]:
    """Image id -> its targets. Raises one DataError that lists every annotation that cannot be used."""
    targets: defaultdict[int, list[Target]] = defaultdict(list)
    faults = []
    for i, entry in enumerate(annotations):
        where = f"annotation {entry.get('id', f'number {i + 1}')}"
        fault = _fault(entry, image_ids, index)
        if fault:
            faults.append(f"{where}: {fault}")
            continue
        targets[entry["image_id"]].append(_target(entry, index))
    refuse(f"{path}: annotations cannot be used:", faults, _WAY_OUT)
    return targets


def _fault(entry: dict[str, Any], image_ids: set[int], index: dict[int, int]) -> str:
    """What is wrong with an annotation, or nothing."""
    image_id, category, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
    if not _whole(image_id) or image_id not in image_ids:
        return f"image_id {repr(image_id)} is not the id of an image"
    if not _whole(category) or category not in index:
        return f"category_id {repr(category)} is not one of {', '.join(map(str, index))}"
    if not (isinstance(box, list) and len(box) == 4 and all(_real(value) for value in box)):
        return f"bbox {repr(box)} is not [left, top, width, height] in finite numbers"
    if entry.get("area") is not None and not (_real(entry["area"]) and entry["area"] >= 0):
        return f"area {entry['area']!r} is not a number of pixels"
    if entry.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd {entry['iscrowd']!r} is not 0 or 1"
    return ""


def _target(entry: dict[str, Any], index: dict[int, int]) -> Target:
    left, top, width, height = (float(value) for value in entry["bbox"])
    area = entry.get("area")
    return Target(
        box=(left, top, left + width, top + height),
        label=index[entry["category_id"]],
        difficult=entry.get("difficult", 0) in (1, True),  # no key of COCO: converters of VOC write it
        crowd=bool(entry.get("iscrowd", 0)),
        area=None if area is None else float(area),
    )


def _image_folder(path: Path, images: list[dict[str, Any]], folders: Sequence[Path]) -> Folder:
    """The first folder that holds every image. Raises DataError with what the best of them lacks."""
    lost: list[str] | None = None
    best: Path | None = None
    for folder in map(Folder, folders):
        missing = [str(image["file_name"]) for image in images if not folder.holds(image["file_name"])]
        if not missing:
            return folder
        if lost is None or len(missing) < len(lost):
            lost, best = missing, folder.path
    tried = ", ".join(str(folder) for folder in folders)
    refuse(f"{path}: images are missing in {best} (looked in {tried}):", lost or [],
           "Add them, or name their folder with --images.")  # fmt: skip
    raise AssertionError("there is at least one image and one folder")


def _record(image: dict[str, Any], folder: Folder, targets: Sequence[Target], tally: Counter[str]) -> Record:
    file = folder.path / image["file_name"]
    size = _size(image.get("height"), image.get("width"))
    tally[NO_SIZE] += size is None
    return make_record(
        image=file,
        image_id=image["id"],
        key=str(image["file_name"]),
        size=size or image_size(file),
        targets=targets,
        tally=tally,
    )


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """Height and width in whole pixels, or None where the file does not say."""
    if all(_real(side) and side >= 1 and side % 1 == 0 for side in (height, width)):
        return int(height), int(width)
    return None


def _refuse_twice(title: str, values: Sequence[object]) -> None:
    refuse(title, [str(value) for value, count in Counter(values).items() if count > 1], _WAY_OUT)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _real(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)
