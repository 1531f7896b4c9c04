"""Image files -> RGB images -> tensors as the transformers image processors make them.

Shape letters: H W pixels.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from qdetr_cli.errors import DataError
from qdetr_cli.reading import check_regular

# Pictures, told by their content. Not EPS and its like: Pillow has other programs run for them.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "QOI")
_SIXTEEN_BIT = 2**16 - 1
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Processor(Protocol):
    """What this package asks of a model's image processor; `families.Processor` has it.

    Images become `size` (H, W) exactly, or their shortest side becomes `shortest` and the longest at most
    `longest`. `pad_to` is the side of a square that every batch is padded to.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def shortest(self) -> int | None: ...
    @property
    def longest(self) -> int | None: ...
    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def rescale(self) -> bool: ...
    @property
    def pad_to(self) -> int | None: ...
    @property
    def bicubic(self) -> bool: ...
    @property
    def antialias(self) -> bool: ...
    @property
    def rounded(self) -> bool: ...
    def output_size(self, height: int, width: int) -> tuple[int, int]: ...


class ImageError(DataError):
    """An image that cannot be used. Keeps its one clear message when a DataLoader's worker raises it.

    There it is made anew from the whole traceback as text: what follows this class's name is the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The image as RGB, 8 bit, upright by its EXIF orientation.

    With `size` (H, W), the annotated size, the orientation that has this size is taken: not every annotation
    tool heeds EXIF. Raises ImageError for what is missing, broken, too large or of another size.
    """
    with _opened(path) as file:
        return _rgb(_turned(file, _turn(file, path, size)), path)


def image_size(path: Path) -> tuple[int, int]:
    """Size (H, W) of an image file as stored, from its header alone. Raises ImageError."""
    with _opened(path) as file:
        return file.height, file.width


def check_header(path: Path, size: tuple[int, int]) -> None:
    """Raise ImageError when the file is no image of `size` (H, W), upright or as stored. Decodes nothing."""
    with _opened(path) as file:
        _turn(file, path, size)


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels of an RGB image as uint8 (3, H, W)."""
    pixels: Tensor = transforms.pil_to_tensor(image)
    return pixels


def resize(pixels: Tensor, size: tuple[int, int], processor: Processor) -> Tensor:
    """Pixels (..., H, W) at another size, as transformers' processors resize them."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    height, width = (max(side, 1) for side in size)  # a hair-thin image may be left without a pixel
    mode = InterpolationMode.BICUBIC if processor.bicubic else InterpolationMode.BILINEAR
    resized: Tensor = transforms.resize(
        pixels if processor.rounded else pixels.float(),
        [height, width],
        interpolation=mode,
        antialias=processor.antialias,
    )
    return resized


def normalize(pixels: Tensor, processor: Processor) -> Tensor:
    """Network input float32 (3, H, W) of pixels uint8 (3, H, W): scaled to 0..1, less mean, over std."""
    scale = 255.0 if processor.rescale else 1.0
    mean = torch.tensor(processor.mean, dtype=torch.float32)[:, None, None] * scale
    std = torch.tensor(processor.std, dtype=torch.float32)[:, None, None] * scale
    return (pixels.float() - mean) / std


def prepare_image(image: Image.Image, processor: Processor) -> Tensor:
    """Network input float32 (3, H, W) of an RGB image: resized and normalized, not padded."""
    size = processor.output_size(image.height, image.width)
    return normalize(resize(to_tensor(image), size, processor), processor)


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image file, opened; every error of Pillow as an ImageError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            check_regular(path)
            with Image.open(path, formats=_formats()) as file:
                yield file
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such image file.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as fault:
        raise ImageError(f"{path}: too large to be decoded safely ({fault}). Scale it down.") from None
    except Exception as fault:  # Pillow's readers raise nearly anything on broken files
        reason = str(fault).replace(f" {str(path)!r}", "") or type(fault).__name__
        raise ImageError(f"{path}: cannot be read as an image ({reason}). Replace or remove it.") from None


def _turn(file: Image.Image, path: Path, size: tuple[int, int] | None) -> int:
    """The EXIF orientation, 1 to 8, to apply so that the image is upright or has `size` (H, W)."""
    stored = (file.height, file.width)
    if stored == size:
        return 1
    orientation = _orientation(file)
    if size is None or (stored == size[::-1] and orientation >= 5):
        return orientation
    raise ImageError(
        f"{path}: the image is {stored[1]}x{stored[0]} but its annotation says {size[1]}x{size[0]} "
        "(width x height), so its boxes would be wrong. Correct the annotation or the image."
    )


def _orientation(file: Image.Image) -> int:
    """What EXIF says, 1 where it is missing or broken: the pixels may be fine all the same."""
    try:
        return int(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's readers raise nearly anything on broken metadata
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    """Any mode as RGB. Pillow alone would cut 16-bit grey at 255."""
    if image.mode.startswith("I"):
        return _from_sixteen_bit(image, path).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{path}: pixels are real numbers of unknown range. Convert the image to 8 bit.")
    return image.convert("RGB")


def _from_sixteen_bit(image: Image.Image, path: Path) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min(initial=0) < 0 or values.max(initial=0) > _SIXTEEN_BIT:
        raise ImageError(f"{path}: pixels do not fit into 16 bit. Convert the image to 8 bit.")
    return Image.fromarray(np.rint(values * (255 / _SIXTEEN_BIT)).astype(np.uint8))
