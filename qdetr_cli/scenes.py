"""Digit scenes: photographs with one to five handwritten digits, the embedded data set of `qdetr demo`.

Every image is a function of (seed, split, index): image 7 is the same whether 10 or 10,000 are written.
The evaluation split draws from digits and photographs that training never sees. Sources and licences: NOTICE.

Shape letters: H W pixels. Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Split = Literal["train", "val"]
Box = tuple[int, int, int, int]
Pixels = npt.NDArray[np.uint8]
Reals = npt.NDArray[np.float32]

CLASS_NAMES = tuple("0123456789")
PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": (
        "acanthus_mollis",
        "airplane_from_above",
        "allium_oreophilum",
        "astronaut",
        "black_canyon",
        "brick",
        "chelsea",
        "dust_bowl_home",
        "flower",
        "french_alpine_landscape",
        "grace_hopper",
        "grass",
        "hubble",
        "locomotion_house_cat",
        "nagasaki_boats",
        "retina",
        "rocket",
    ),
    "val": ("camera", "china", "coffee", "gravel", "march_pastoral", "raccoon"),
}
ASSETS = Path(__file__).parent / "demo_assets"

_VAL_EVERY = 5  # digit i belongs to val when i % 5 == 4; the file holds 500 of each class in a row
_SPLIT_KEY: dict[Split, int] = {"train": 0, "val": 1}
_CROP_KEY = 2  # keeps the stream of `digit_crop` apart from the streams of the scenes
_INK = 0.3  # opacity from which a pixel counts as ink, so that boxes are tight around what the eye sees
_HEIGHTS = (14 / 64, 36 / 64)  # of a digit, as a part of the image side
_COVERED = 0.4  # a digit is difficult when later digits' boxes cover more than this part of its box


@dataclass(frozen=True, slots=True, kw_only=True)
class Digit:
    """One digit as drawn: class index 0..9, box tight around all of its ink, and whether others cover it."""

    label: int
    box: Box
    difficult: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """An image (H, W, 3) uint8 and its digits, in the order in which they were drawn."""

    image: Pixels
    digits: tuple[Digit, ...]


def scene(index: int, *, split: Split, size: int = 64, seed: int = 0) -> Scene:
    """Draw the scene that (seed, split, index) names, `size` x `size` pixels."""
    rng = np.random.default_rng((seed, _SPLIT_KEY[split], index))
    canvas = _background(rng, split, size)
    overlap = 0.7 if rng.random() < 0.1 else 0.25  # a few crowded scenes
    labels: list[int] = []
    boxes: list[Box] = []
    for _ in range(int(rng.integers(1, 6))):
        label, ink = _ink(rng, split, size * _log_uniform(rng, *_HEIGHTS))
        box = _free_place(rng, ink, boxes, size, overlap)
        if box is None:
            continue
        _paint(rng, canvas, ink, box)
        labels.append(label)
        boxes.append(box)
    digits = tuple(
        Digit(label=label, box=box, difficult=_covered(box, boxes[i + 1 :]) > _COVERED)
        for i, (label, box) in enumerate(zip(labels, boxes, strict=True))
    )
    return Scene(image=_expose(rng, canvas), digits=digits)


def digit_crop(index: int, *, size: int = 32, seed: int = 0) -> tuple[Pixels, int]:
    """Crop number `index` of the training split: one digit on a photograph (size, size, 3), its class.

    For warming up a backbone by classification. The digit fills 45 to 95 % of the height.
    """
    rng = np.random.default_rng((seed, _CROP_KEY, index))
    canvas = _background(rng, "train", size)
    label, ink = _ink(rng, "train", size * float(rng.uniform(0.45, 0.95)))
    ink = ink[:size, :size]
    box = _free_place(rng, ink, [], size, 0.0)
    assert box is not None, "an empty image has room"
    _paint(rng, canvas, ink, box)
    return _expose(rng, canvas), label


@cache
def _digits(split: Split) -> tuple[Pixels, Pixels]:
    """Digits of a split: (N, 28, 28) grey, ink is 255, and (N,) classes."""
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    chosen = (np.arange(len(labels)) % _VAL_EVERY == _VAL_EVERY - 1) == (split == "val")
    return images[chosen], labels[chosen]


@cache
def _photos(split: Split) -> tuple[Image.Image, ...]:
    return tuple(Image.open(ASSETS / "photos" / f"{name}.jpg").convert("RGB") for name in PHOTOS[split])


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _background(rng: np.random.Generator, split: Split, size: int) -> Reals:
    """A random square of a random photograph, (size, size, 3) in 0..255: flipped, turned, tinted."""
    photos = _photos(split)
    photo = photos[int(rng.integers(len(photos)))]
    side = min(photo.size) * _log_uniform(rng, 0.25, 1.0)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    square = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.rot90(np.asarray(square, dtype=np.float32), int(rng.integers(4)))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    tint = rng.uniform(0.75, 1.25, 3).astype(np.float32) * np.float32(rng.uniform(0.6, 1.1))
    return np.clip(pixels * tint + np.float32(rng.uniform(-20, 40)), 0, 255)


def _ink(rng: np.random.Generator, split: Split, height: float) -> tuple[int, Reals]:
    """A class and the opacity (h, w) in 0..1 of one of its digits, cropped to its ink; h is near `height`."""
    images, labels = _digits(split)
    pick = int(rng.integers(len(labels)))
    scale = height / 20  # MNIST fits each digit into 20 x 20 of its 28 x 28 pixels
    turn, shear = rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)
    cos, sin = np.cos(turn), np.sin(turn)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
    forward = forward @ np.diag([scale * rng.uniform(0.85, 1.2), scale])
    back = np.linalg.inv(forward)  # Pillow asks where each output pixel comes from
    side = int(np.ceil(34 * scale))
    shift = 14 - back @ np.array([side / 2, side / 2])
    coefficients = (*back[0], shift[0], *back[1], shift[1])
    drawn = Image.fromarray(images[pick]).transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    opacity = np.minimum(np.asarray(drawn, dtype=np.float32) * np.float32(rng.uniform(1.0, 1.5) / 255), 1)
    return int(labels[pick]), _cropped(opacity)


def _cropped(opacity: Reals) -> Reals:
    """The smallest window that holds every pixel of ink; fainter pixels outside are cut off."""
    seen = opacity >= _INK
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(
    rng: np.random.Generator, ink: Reals, taken: list[Box], size: int, overlap: float
) -> Box | None:
    """A box for `ink` inside the image that shares at most `overlap` of the smaller box with a taken one."""
    height, width = ink.shape
    for _ in range(12):
        left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_shared(box, other) <= overlap * min(area(box), area(other)) for other in taken):
            return box
    return None


def area(box: Box) -> int:
    """The pixels of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Box, b: Box) -> int:
    """Pixels that two boxes have in common."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _covered(box: Box, later: list[Box]) -> float:
    """The part of `box`, 0..1, that the union of the later boxes hides."""
    left, top, right, bottom = box
    hidden = np.zeros((bottom - top, right - left), dtype=bool)
    for other in later:
        rows = slice(max(other[1] - top, 0), max(other[3] - top, 0))
        hidden[rows, max(other[0] - left, 0) : max(other[2] - left, 0)] = True
    return float(hidden.mean())


def _paint(rng: np.random.Generator, canvas: Reals, ink: Reals, box: Box) -> None:
    """Blend `ink` into `canvas` (H, W, 3) at `box`, in a colour that stands out from what lies beneath."""
    left, top, right, bottom = box
    under = canvas[top:bottom, left:right]
    wanted = 45 if rng.random() < 0.1 else 90  # distance of mean colours; one digit in ten is hard to see
    colours = rng.uniform(0, 255, (8, 3)).astype(np.float32)
    distances = np.sqrt(np.square(colours - under.mean(axis=(0, 1))).mean(axis=1))
    fit = np.flatnonzero(distances >= wanted)
    colour = colours[fit[0] if len(fit) else np.argmax(distances)]
    opacity = ink[:, :, None] * np.float32(rng.uniform(0.85, 1.0))
    under += (colour - under) * opacity


def _expose(rng: np.random.Generator, canvas: Reals) -> Pixels:
    """The finished image, uint8, a little darker or brighter."""
    bright = canvas * np.float32(rng.uniform(0.85, 1.15))
    pixels: Pixels = np.clip(np.rint(bright), 0, 255).astype(np.uint8)
    return pixels
