"""Reading Pascal VOC: Annotations/*.xml, JPEGImages/*, ImageSets/Main/<split>.txt.

VOC counts pixels from 1 and includes the last: a box becomes (xmin - 1, ymin - 1, xmax, ymax).
Entities and document types in the XML are refused, and file names that leave their folder.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

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
from qdetr_cli.reading import check_regular

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_YES_NO = {"": False, "0": False, "1": True, "false": False, "true": True}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Object:
    name: str
    box: tuple[float, float, float, float]  # corners in pixels from 0
    difficult: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Annotation:
    filename: str
    size: tuple[int, int] | None  # H, W
    objects: tuple[_Object, ...]


class _NoDocumentType(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Entities need a document type: refusing it refuses every attack that is built on them."""
        raise DataError("a document type (<!DOCTYPE>) is not allowed in an annotation. Remove it")


def read_voc(root: Path, *, split: str, images: Path | None, classes: Sequence[str] | None) -> DetectionData:
    """The split of a VOC root; see `open_data`."""
    keys = _keys(root, split)
    folder = Folder(images or root / "JPEGImages")
    parsed = _parse_all([root / "Annotations" / f"{key}.xml" for key in keys])
    files = _image_files(keys, parsed, folder)
    names = tuple(classes) if classes is not None else _all_names(root, parsed)
    _check_names(keys, parsed, names)
    index = {name: i for i, name in enumerate(names)}
    tally: Counter[str] = Counter()
    records = tuple(
        _record(key, i + 1, annotation, file, index, tally)
        for i, (key, annotation, file) in enumerate(zip(keys, parsed, files, strict=True))
    )
    return DetectionData(
        kind="voc",
        root=root,
        split=split,
        class_names=names,
        category_ids=tuple(range(1, len(names) + 1)),
        records=records,
        warnings={what: count for what, count in tally.items() if count},
    )


def voc_splits(root: Path) -> list[str]:
    """Names of the splits of a VOC root, without the lists of single classes (`cat_train.txt`)."""
    names = sorted(path.stem for path in (root / "ImageSets" / "Main").glob("*.txt"))
    return [name for name in names if name.rpartition("_")[0] == "" or name.rpartition("_")[2] not in names]


def _keys(root: Path, split: str) -> list[str]:
    """The images that ImageSets/Main/<split>.txt lists, checked to have an annotation each."""
    path = root / "ImageSets" / "Main" / f"{safe_relative(split, 'split')}.txt"
    if not path.is_file():
        found = ", ".join(voc_splits(root)) or "none"
        raise DataError(f"{path}: there is no such split. Splits found: {found}. Name one with --split.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{path}: cannot be read as a list of image names ({fault}).") from None
    annotations = Folder(root / "Annotations")
    keys = [_key(line.strip(), annotations, path) for line in lines if line.strip()]
    if not keys:
        raise DataError(f"{path}: the split lists no image. Write one image name on each line.")
    refuse(f"{path}: images are listed twice:", [key for key, n in Counter(keys).items() if n > 1],
           "Remove the second lines.")  # fmt: skip
    lost = [key for key in keys if not annotations.holds(PurePosixPath(f"{key}.xml"))]
    refuse(f"{root / 'Annotations'}: annotations that {path.name} lists are missing:",
           [f"{key}.xml" for key in lost], "Add them, or take the lines out of the list.")  # fmt: skip
    return keys


def _key(line: str, annotations: Folder, path: Path) -> str:
    """The image that a line names: alone, with a suffix, or with VOC's class flag (`2007_000032  1`)."""
    first = line.split()[0]
    stem, dot, suffix = first.rpartition(".")
    for key in (line, first, stem if f"{dot}{suffix}".lower() in _SUFFIXES else ""):
        if key and annotations.holds(safe_relative(f"{key}.xml", str(path))):
            return key
    return first


def _parse_all(paths: Sequence[Path]) -> list[_Annotation]:
    """The annotations of these files. Raises one DataError that lists every file that cannot be used."""
    parsed: list[_Annotation] = []
    faults: list[str] = []
    for path in paths:
        try:
            parsed.append(_parse(path))
        except DataError as fault:
            faults.append(f"{path.name}: {fault}")
    if faults:
        refuse(f"{paths[0].parent}: annotations cannot be used:", faults, "Correct these files.")
    return parsed


def _parse(path: Path) -> _Annotation:
    root = _tree(path)
    if root.tag != "annotation":
        raise DataError(f"the outermost element is <{root.tag}>, not <annotation>")
    return _Annotation(
        filename=(root.findtext("filename") or "").strip(),
        size=_size(root.find("size")),
        objects=tuple(_object(element, i + 1) for i, element in enumerate(root.findall("object"))),
    )


def _tree(path: Path) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_NoDocumentType())
    try:
        check_regular(path)
        return ElementTree.parse(path, parser).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as fault:
        raise DataError(f"not well-formed XML ({fault})") from None


def _size(element: ElementTree.Element | None) -> tuple[int, int] | None:
    """Height and width, or None where the annotation does not say (some tools write 0)."""
    if element is None:
        return None
    height, width = (_number(element, side, "size") for side in ("height", "width"))
    if height <= 0 or width <= 0:
        return None
    if height % 1 or width % 1:
        raise DataError(f"size: {width:g}x{height:g} is not in whole pixels")
    return int(height), int(width)


def _object(element: ElementTree.Element, number: int) -> _Object:
    where = f"object {number}"
    name = (element.findtext("name") or "").strip()
    if not name:
        raise DataError(f"{where} has no <name>")
    box = element.find("bndbox")
    if box is None:
        raise DataError(f"{where} ({name}) has no <bndbox>")
    left, top, right, bottom = (_number(box, corner, f"{where} ({name}), bndbox") for corner in _CORNERS)
    flag = (element.findtext("difficult") or "").strip().lower()
    if flag not in _YES_NO:
        raise DataError(f"{where} ({name}): difficult is {flag!r}, not 0 or 1")
    return _Object(name=name, box=(left - 1, top - 1, right, bottom), difficult=_YES_NO[flag])


def _number(element: ElementTree.Element, tag: str, where: str) -> float:
    text = (element.findtext(tag) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: <{tag}> is {text!r}, not a number" if text else f"{where} has no <{tag}>")
    return value


def _all_names(root: Path, parsed: Sequence[_Annotation]) -> tuple[str, ...]:
    """Classes of the whole root, sorted as VOC's own are, so that every split has the same order."""
    paths = sorted((root / "Annotations").rglob("*.xml"))
    everything = parsed if len(paths) == len(parsed) else _parse_all(paths)
    names = sorted({thing.name for annotation in everything for thing in annotation.objects})
    if not names:
        raise DataError(f"{root / 'Annotations'}: no annotation has an <object>: there is no class.")
    return tuple(names)


def _check_names(keys: Sequence[str], parsed: Sequence[_Annotation], names: Sequence[str]) -> None:
    """Raise DataError when an object's class is not one of `names`."""
    unknown: dict[str, str] = {}
    for key, annotation in zip(keys, parsed, strict=True):
        for thing in annotation.objects:
            if thing.name not in names:
                unknown.setdefault(thing.name, key)
    refuse("objects are of classes that the model or the training split does not have:",
           [f"{name!r} in {key}.xml{near(name, names)}" for name, key in unknown.items()],
           f"Known classes: {', '.join(names)}. Rename them, or train with these classes.")  # fmt: skip


def _image_files(keys: Sequence[str], parsed: Sequence[_Annotation], folder: Folder) -> list[Path]:
    """The image of each key: <key>.jpg or another known suffix, or what the annotation's <filename> says."""
    files = [_image_file(key, a.filename, folder) for key, a in zip(keys, parsed, strict=True)]
    lost = [f"{key} (.jpg, .png, ...)" for key, file in zip(keys, files, strict=True) if file is None]
    refuse(f"{folder.path}: images are missing:", lost, "Add them, or name another folder with --images.")
    return [folder.path / file for file in files if file is not None]


def _image_file(key: str, filename: str, folder: Folder) -> str | None:
    """None when there is none. An absolute <filename>, as some tools write, is refused where it is needed."""
    same = [name for name in folder.with_stem(PurePosixPath(key)) if name.lower().endswith(_SUFFIXES)]
    if filename and (not same or ".." in filename.replace("\\", "/").split("/")):
        named = safe_relative(filename, f"{key}.xml")
        return str(named) if folder.holds(named) else None
    order = {suffix: i for i, suffix in enumerate(_SUFFIXES)}
    return min(
        same, key=lambda name: (name != filename, order[PurePosixPath(name).suffix.lower()]), default=None
    )


def _record(
    key: str, image_id: int, annotation: _Annotation, file: Path, index: dict[str, int], tally: Counter[str]
) -> Record:
    if annotation.size is None:
        tally[NO_SIZE] += 1
    return make_record(
        image=file,
        image_id=image_id,
        key=key,
        size=annotation.size or image_size(file),
        targets=[Target(box=o.box, label=index[o.name], difficult=o.difficult) for o in annotation.objects],
        tally=tally,
    )
