"""How a detector wants its pixels, as a plain value that is read from and written to Hugging Face keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdetr_cli.errors import CheckpointError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST = 16384  # pixels of a side; attention over more would fill any memory
BILINEAR, BICUBIC = 2, 3  # PIL's numbers, which `resample` holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """Resize, scale, normalise and pad. With neither `size` nor `shortest` images keep their size.

    After resizing, sides are cut to multiples of `divisor`, as YOLOS's are and those of windowed transformers
    must be.
    """

    shortest: int | None = None  # DETR: the shorter side after resizing ...
    longest: int | None = None  # ... unless the longer side would pass this
    size: tuple[int, int] | None = None  # RT-DETR: (H, W) that every image is squashed to
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    rescale: bool = True  # bytes to 0..1
    pad: bool = False  # to the largest image of the batch
    pad_to: int | None = None  # side of the square that every image is padded to
    divisor: int = 1  # both sides are multiples of it
    bicubic: bool = False  # else bilinear
    antialias: bool = True  # False: as OpenCV resizes
    rounded: bool = True  # resized pixels become bytes again; False: they are resized as real numbers

    @classmethod
    def from_config(cls, config: Mapping[str, Any], fallback: "Processor | None" = None) -> "Processor":
        """The processor that `preprocessor_config.json` describes; keys that it lacks come from `fallback`.

        Reads transformers 5 keys and the older ones (`size` an int, `max_size`, `pad_and_return_pixel_mask`).
        Raises CheckpointError for what qdetr does not do, such as cropping, and for a size that the divisor
        does not divide.
        """
        try:
            return cls._read(config, fallback or cls())
        except CheckpointError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"preprocessor_config.json: holds what no image processor writes ({error})"
            ) from error

    @classmethod
    def _read(cls, config: Mapping[str, Any], default: "Processor") -> "Processor":
        _refuse_unsupported(config)
        shortest, longest, size = _resize(config, default)
        mean, std = _normalise(config, default)
        pad = config.get("do_pad", config.get("pad_and_return_pixel_mask"))
        resample = config.get("resample")
        made = cls(
            shortest=shortest,
            longest=longest,
            size=size,
            mean=mean,
            std=std,
            rescale=bool(config.get("do_rescale", default.rescale)),
            pad=default.pad if pad is None else bool(pad),
            pad_to=_pad_to(config.get("pad_size"), default),
            divisor=int(config.get("size_divisor") or default.divisor),
            bicubic=default.bicubic if resample is None else resample == BICUBIC,
            antialias=bool(config.get("antialias", default.antialias)),
            rounded=bool(config.get("round_resized", default.rounded)),
        )
        _refuse_impossible(made)
        _refuse_undivided(made)
        return made

    def to_config(self) -> dict[str, Any]:
        """The keys of a `preprocessor_config.json`, complete, so that `from_config` gives `self` back."""
        config: dict[str, Any] = {
            "do_resize": self.size is not None or self.shortest is not None,
            "do_rescale": self.rescale,
            "rescale_factor": 1 / 255,
            "do_normalize": any(self.mean) or any(value != 1 for value in self.std),
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_pad": self.pad,
            "pad_size": None if self.pad_to is None else {"height": self.pad_to, "width": self.pad_to},
            "resample": BICUBIC if self.bicubic else BILINEAR,
            "size_divisor": self.divisor,
            "antialias": self.antialias,
            "round_resized": self.rounded,
        }
        if self.size is not None:
            config["size"] = {"height": self.size[0], "width": self.size[1]}
        elif self.shortest is not None:
            config["size"] = {"shortest_edge": self.shortest, "longest_edge": self.longest}
        return config

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of an image of `height` x `width` pixels after resizing, rounded as transformers does.

        DETR's rule (`get_size_with_aspect_ratio`): the shorter side becomes `shortest`, less where the longer
        side would pass `longest`; the other side is cut to whole pixels from the unrounded ratio.
        """
        if self.size is not None:
            return self.size
        height, width = self._by_shortest(height, width)
        return self._divided(height), self._divided(width)

    def _divided(self, side: int) -> int:
        return max(side - side % self.divisor, self.divisor)

    def _by_shortest(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest is None:
            return height, width
        low, high = min(height, width), max(height, width)
        side = float(self.shortest)
        if self.longest is not None and high / low * self.shortest > self.longest:
            side = self.longest * low / high
        short = round(side)
        if low == short:
            return height, width
        return (int(side * height / width), short) if width < height else (short, int(side * width / height))


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError that lists every setting whose effect qdetr would lose."""
    faults = []
    if config.get("do_center_crop"):
        faults.append("do_center_crop")
    if config.get("do_resize", True) and config.get("resample") not in (BILINEAR, BICUBIC, None):
        faults.append(f"resample {config['resample']} (only 2, bilinear, and 3, bicubic)")
    factor = config.get("rescale_factor")
    if config.get("do_rescale", True) and factor is not None and abs(float(factor) * 255 - 1) > 1e-6:
        faults.append(f"rescale_factor {factor} (only 1/255)")
    if faults:
        raise CheckpointError(f"preprocessor_config.json: qdetr does not do {', '.join(faults)}")


def _refuse_impossible(made: Processor) -> None:
    """Raise CheckpointError for sides and colours that no image can be brought to."""
    sides = (made.shortest, made.longest, *(made.size or ()), made.pad_to, made.divisor)
    if odd := [side for side in sides if side is not None and not 1 <= side <= LARGEST]:
        raise CheckpointError(f"preprocessor_config.json: a side of {odd[0]} pixels is not 1 to {LARGEST}")
    for name, numbers in (("image_mean", made.mean), ("image_std", made.std)):
        if len(numbers) not in (1, 3) or not all(math.isfinite(each) for each in numbers):
            raise CheckpointError(f"preprocessor_config.json: {name} {list(numbers)} is not three numbers")
    if not all(each > 0 for each in made.std):
        raise CheckpointError(f"preprocessor_config.json: image_std {list(made.std)}: must be above 0")


def _refuse_undivided(made: Processor) -> None:
    for name, sides in (
        ("size", made.size or ()),
        ("pad_size", () if made.pad_to is None else (made.pad_to,)),
    ):
        if any(side % made.divisor for side in sides):
            text = "x".join(map(str, sides))
            raise CheckpointError(
                f"preprocessor_config.json: {name} {text}: this model needs multiples of {made.divisor}"
            )


Resize = tuple[int | None, int | None, tuple[int, int] | None]


def _resize(config: Mapping[str, Any], default: Processor) -> Resize:
    if not config.get("do_resize", True):
        return None, None, None
    size = config.get("size")
    if size is None:
        return default.shortest, default.longest, default.size
    if isinstance(size, int):  # transformers < 4.26
        size = {"height": size, "width": size} if default.size else {"shortest_edge": size}
    elif isinstance(size, (list, tuple)):
        size = {"height": size[0], "width": size[1]}
    if size.get("height") and size.get("width"):
        return None, None, (int(size["height"]), int(size["width"]))
    if size.get("longest_edge") and default.shortest:  # some Table Transformers say no more
        size = {"shortest_edge": default.shortest, **size}
    if size.get("shortest_edge"):
        longest = size.get("longest_edge") or config.get("max_size") or default.longest
        return int(size["shortest_edge"]), None if longest is None else int(longest), None
    raise CheckpointError(
        f"preprocessor_config.json: size {dict(size)} has neither height and width nor shortest_edge"
    )


def _normalise(config: Mapping[str, Any], default: Processor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not config.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    switched_on = "do_normalize" in config and default.mean == (0.0, 0.0, 0.0)
    mean = IMAGENET_MEAN if switched_on else default.mean
    std = IMAGENET_STD if switched_on else default.std
    return tuple(config.get("image_mean") or mean), tuple(config.get("image_std") or std)


def _pad_to(size: Mapping[str, int] | None, default: Processor) -> int | None:
    if not size:
        return default.pad_to
    if size["height"] != size["width"]:
        raise CheckpointError(f"preprocessor_config.json: pad_size {dict(size)} is not square")
    return int(size["height"])
