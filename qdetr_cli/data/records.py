"""What a data set is, whatever its form on disk: images, boxes in pixels, class indices.

Shape letters: H W pixels, T targets of one image, C classes.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from qdetr_cli.errors import DataError

Reals = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

LISTED = 10  # faults that a message spells out; the rest is counted
_ROUNDING = 0.5  # pixels: COCO's own boxes stick out by less, and stay as annotated so that its AP is exact

CLIPPED = "boxes clipped to the image"
DROPPED = "boxes dropped: no area inside the image"
NO_SIZE = "images without a size in the annotation: read from the file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image and what is annotated on it.

    `boxes` (T, 4) are corners in pixels, continuous and counted from 0; they may stick out of the image by
    half a pixel. `labels` (T,) index `class_names`. `area` (T,) is the segment's area where COCO has one.
    """

    image: Path
    image_id: int
    key: str
    width: int
    height: int
    boxes: Reals
    labels: Ints
    difficult: Flags
    crowd: Flags
    area: Reals


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionData:
    """One split of a data set. `warnings` counts what was repaired or left out while reading."""

    kind: Literal["voc", "coco"]
    root: Path
    split: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[Record, ...]
    warnings: dict[str, int] = field(default_factory=dict)

    def take(self, indices: Iterable[int]) -> "DetectionData":
        """The same data with the chosen images only, in the order given."""
        return replace(self, records=tuple(self.records[i] for i in indices))


@dataclass(slots=True, kw_only=True)
class Target:
    """One annotated object as read, corners in pixels from 0."""

    box: tuple[float, float, float, float]
    label: int
    difficult: bool = False
    crowd: bool = False
    area: float | None = None


def make_record(
    *,
    image: Path,
    image_id: int,
    key: str,
    size: tuple[int, int],
    targets: Sequence[Target],
    tally: Counter[str],
) -> Record:
    """A record of the targets that have area inside an image of `size` (H, W); `tally` counts repairs."""
    height, width = size
    raw: Reals = np.array([t.box for t in targets], dtype=np.float64).reshape(-1, 4)  # (T, 4)
    limit = np.array([width, height, width, height], dtype=np.float64)
    inside = np.clip(raw, 0, limit)
    keep = np.all(inside[:, 2:] > inside[:, :2], axis=1)
    out = np.any(np.abs(raw - inside) > _ROUNDING, axis=1)
    boxes = np.where(out[:, None], inside, raw)[keep]
    tally.update({CLIPPED: int((out & keep).sum()), DROPPED: int((~keep).sum())})
    kept = [target for target, good in zip(targets, keep, strict=True) if good]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    own = [area if target.area is None else target.area for target, area in zip(kept, areas, strict=True)]
    return Record(
        image=image,
        image_id=image_id,
        key=key,
        width=width,
        height=height,
        boxes=boxes,
        labels=np.array([t.label for t in kept], dtype=np.int64),
        difficult=np.array([t.difficult for t in kept], dtype=np.bool_),
        crowd=np.array([t.crowd for t in kept], dtype=np.bool_),
        area=np.array(own, dtype=np.float64),
    )


def refuse(title: str, faults: Sequence[str], way_out: str = "") -> None:
    """Raise DataError with the first faults and the number of the others; return when there is none."""
    if not faults:
        return
    lines = [title, *(f"  {fault}" for fault in faults[:LISTED])]
    if len(faults) > LISTED:
        lines.append(f"  ... and {len(faults) - LISTED} more")
    raise DataError("\n".join([*lines, way_out] if way_out else lines))


def safe_relative(name: str, where: str) -> PurePosixPath:
    """`name` as a path that stays below its folder. Raises DataError, naming `where`, when it does not."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = len(name) > 1 and name[1] == ":"
    if not path.parts or path.is_absolute() or drive or ".." in path.parts or "\0" in name:
        raise DataError(f"{where}: file name {name!r} leaves its folder. Write it relative to that folder.")
    return path


class Folder:
    """The files below a folder. Each subfolder is listed once: looking for a file costs no disk access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, dict[str, list[str]]] = {}

    def _listing(self, below: str) -> dict[str, list[str]]:
        """Stem -> file names in the subfolder `below`; empty when there is no such folder."""
        if below not in self._names:
            stems: dict[str, list[str]] = {}
            folder = self.path / below
            for name in _names(folder):
                stems.setdefault(PurePosixPath(name).stem, []).append(name)
            self._names[below] = stems
        return self._names[below]

    def holds(self, name: PurePosixPath) -> bool:
        """Whether the file `name`, relative to the folder, is there."""
        return name.name in self._listing(str(name.parent)).get(name.stem, ())

    def with_stem(self, key: PurePosixPath) -> list[str]:
        """Names of the files `key`.*, relative to the folder; a stem may hold dots."""
        listing = self._listing(str(key.parent))
        return [str(key.parent / name) for name in listing.get(key.name, ())]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError as fault:
        raise DataError(f"{folder}: cannot be listed ({fault}).") from None


def near(name: str, valid: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the valid name closest to `name`, or nothing."""
    choices = {choice.casefold(): choice for choice in valid}
    found = get_close_matches(name.casefold(), choices, n=1)
    return f", did you mean {choices[found[0]]!r}?" if found else ""
