"""An exported file as a detector that is evaluated and asked for boxes like any other.

A file has one image size, as a rule. An image becomes what the family's processor makes of it and is padded
to that size; where it would not fit it is shrunk further, its ratio kept. Files without a mask, and families
that squash, get the image at exactly that size: their boxes are parts of the whole input.

Shape letters: B images, H W pixels, Q queries, C classes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qdetr_cli import plugins
from qdetr_cli.checkpoint import Detector
from qdetr_cli.errors import CheckpointError, ExportError, PluginError
from qdetr_cli.export.metadata import Metadata
from qdetr_cli.families import family_of
from qdetr_cli.instructions import sums_overflow
from qdetr_cli.processors import Processor
from qdetr_cli.sessions import Inputs, Session, open_session

Size = tuple[int, int]


class Found(NamedTuple):
    """A detector's outputs, named as transformers names them."""

    logits: Tensor  # (B, Q, C)
    pred_boxes: Tensor  # (B, Q, 4) cxcywh in 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """An exported file, loaded: what qdetr wrote of it, and the detector that it is."""

    path: Path
    metadata: Metadata
    session: Session
    detector: Detector

    @property
    def may_overflow(self) -> bool:
        """Whether sums of its products may be cut here: see `instructions`."""
        return self.metadata.quantized and not self.metadata.portable and sums_overflow()


def open_artefact(path: Path, threads: int | None = None) -> Artefact:
    """The file as a detector. Raises ExportError for one that is not qdetr's, PluginError for its family."""
    session = open_session(path, threads)
    if session.metadata is None:
        raise ExportError(
            f"{path}: does not say what its classes are and how images are prepared, so qdetr did not write "
            "it; write it with `qdetr export`"
        )
    metadata, pixels = _told(path, session.metadata)
    _check_classes(path, metadata, session)
    family = family_of(metadata.family)
    detector = Detector(
        model=FileDetector(session),
        family=family,
        processor=for_inputs(pixels, session.inputs),
        class_names=dict(metadata.class_names),
        source=str(path),
    )
    return Artefact(path=path, metadata=metadata, session=session, detector=detector)


def for_inputs(processor: Processor, inputs: Inputs) -> Processor:
    """The processor that prepares images for a file of these inputs."""
    if inputs.size is None:
        return processor
    if processor.size is not None or inputs.mask is None:
        return replace(processor, size=inputs.size, shortest=None, longest=None, pad_to=None)
    fields = {name: getattr(processor, name) for name in Processor.__dataclass_fields__}
    return Shrinking(**fields | {"pad_to": None}, within=inputs.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinking(Processor):
    """A processor whose images never pass `within` (H, W); the ratio of their sides is kept."""

    within: Size

    def output_size(self, height: int, width: int) -> Size:
        """(H, W) as the family resizes, less where that does not fit."""
        wanted = Processor.output_size(self, height, width)
        most = self._divided(self.within[0]), self._divided(self.within[1])
        if wanted[0] <= most[0] and wanted[1] <= most[1]:
            return wanted
        scale = min(most[0] / height, most[1] / width)
        fitted = (min(round(height * scale), most[0]), min(round(width * scale), most[1]))
        return self._divided(max(fitted[0], 1)), self._divided(max(fitted[1], 1))


class Canvas(nn.Module):
    """A model that sees every batch on a canvas of one size: padded at the right and bottom, and masked."""

    def __init__(self, model: nn.Module, size: Size | None) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Any:
        """What the model says of `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W), 1 for image."""
        return self.model(
            pixel_values=padded(pixel_values, self.size), pixel_mask=padded(pixel_mask, self.size)
        )


class FileRunner(nn.Module):
    """A session as a module. Where a file has a fixed number of images, batches are cut and filled up."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Found:
        """Logits and boxes of any number of images."""
        count = self.session.inputs.batch or len(pixel_values)
        pixels = pixel_values.cpu().numpy()  # (B, 3, H, W)
        mask = pixel_mask.cpu().numpy()  # (B, H, W)
        parts = [
            self.session.run(
                filled(pixels[start : start + count], count), filled(mask[start:][:count], count)
            )
            for start in range(0, len(pixels), count)
        ]
        whole = (np.concatenate(each)[: len(pixels)] for each in zip(*parts, strict=True))
        return Found(*(torch.from_numpy(each).float() for each in whole))


class FileDetector(Canvas):
    """A session as the torch module of a detector."""

    def __init__(self, session: Session) -> None:
        super().__init__(FileRunner(session), session.inputs.size)


def padded(images: Tensor, size: Size | None) -> Tensor:
    """`images` (..., h, w) with zeros at the right and below up to `size` (H, W); None: as they are."""
    if size is None:
        return images
    right, below = size[1] - images.shape[-1], size[0] - images.shape[-2]
    assert right >= 0 <= below, "the processor of a file makes no image that is larger than the file"
    return pad(images, (0, right, 0, below))


def filled(images: Any, count: int) -> Any:
    """The images, the last of them again until there are `count`: padding alone is nothing to attend to."""
    missing = count - len(images)
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images


def _check_classes(path: Path, metadata: Metadata, session: Session) -> None:
    """Raise ExportError where the file names classes that it does not tell."""
    count = session.classes
    strange = [index for index in metadata.class_names if index < 0 or (count is not None and index >= count)]
    if strange or not metadata.class_names:
        raise ExportError(
            f"{path}: its qdetr metadata names {f'class {strange[0]}' if strange else 'no class'}, and its "
            f"logits have {count or 'any number of'} classes; export it again"
        )


def _told(path: Path, text: str) -> tuple[Metadata, Processor]:
    """What the file says of itself, and the processor of its family that it names."""
    try:
        metadata = Metadata.from_json(text)
        if metadata.family not in plugins.names("family"):
            raise PluginError(
                f"{path}: is of the family {metadata.family}, which a plugin brings; name its folder "
                "with --plugins"
            )
        return metadata, Processor.from_config(metadata.processor, family_of(metadata.family).processor)
    except (CheckpointError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{path}: its qdetr metadata cannot be read ({error}); export it again") from error
