"""Samples and batches: what a model gets, from a data set's records.

Shape letters: B images, H W pixels, T targets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qdetr_cli.boxes import xyxy_to_cxcywh
from qdetr_cli.data.augment import changed, inside
from qdetr_cli.data.images import Processor, normalize, read_image, resize, to_tensor
from qdetr_cli.data.records import DetectionData
from qdetr_cli.recipe import Augment

_SCALE_KEY = 1  # keeps the stream of scales apart from the stream of the other changes


@dataclass(slots=True, kw_only=True)
class Sample:
    """One network input. `size` is the annotated (H, W), `pad_to` the side of the square to pad to, or None.

    `labels` hold `class_labels` int64 (T,), indices of the model, and `boxes` float32 (T, 4), cxcywh as parts
    of `pixel_values` (3, H, W).
    """

    pixel_values: Tensor
    labels: dict[str, Tensor]
    image_id: int
    size: tuple[int, int]
    pad_to: int | None = None


@dataclass(slots=True, kw_only=True)
class Batch:
    """`pixel_values` float32 (B, 3, H, W), `pixel_mask` int64 (B, H, W) with 1 for image and 0 for padding.

    `labels` as in Sample, boxes still as parts of the unpadded image. `sizes` int64 (B, 2): annotated (H, W).
    """

    pixel_values: Tensor
    pixel_mask: Tensor
    labels: list[dict[str, Tensor]]
    image_ids: list[int]
    sizes: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with every tensor on `device`, images with channels last, as convolutions are fastest."""
        return Batch(
            pixel_values=self.pixel_values.to(device, non_blocking=True, memory_format=torch.channels_last),
            pixel_mask=self.pixel_mask.to(device, non_blocking=True),
            labels=[{key: value.to(device) for key, value in label.items()} for label in self.labels],
            image_ids=self.image_ids,
            sizes=self.sizes.to(device),
        )

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory: what a DataLoader with pin_memory=True asks for."""
        return Batch(
            pixel_values=self.pixel_values.pin_memory(),
            pixel_mask=self.pixel_mask.pin_memory(),
            labels=self.labels,
            image_ids=self.image_ids,
            sizes=self.sizes,
        )


class ImageSet(Dataset[Sample]):
    """The records of a split as samples, changed at random when `augment` is given.

    Sample i depends on (seed, epoch, i) alone, whichever worker makes it. Only where the processor squashes,
    one of `augment.scales` holds for the whole batch, drawn by (seed, epoch, first i): nothing is padded.
    `class_index` maps the data set's labels to the model's. Crowds are left out of the labels; difficult
    objects stay, as is usual for VOC.
    """

    def __init__(
        self,
        data: DetectionData,
        processor: Processor,
        class_index: Sequence[int],
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        assert len(class_index) == len(data.class_names), "one index of the model for each class of the data"
        self.data = data
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self._class_index = torch.tensor(list(class_index), dtype=torch.int64)
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # persistent workers see it change

    def __len__(self) -> int:
        return len(self.data.records)

    def set_epoch(self, epoch: int) -> None:
        """Draw other random changes from here on, in the workers too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, self._scale(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of a batch: what a DataLoader calls."""
        if self.processor.size is None:
            return [self[index] for index in indices]
        scale = self._scale(indices[0])
        return [self._sample(index, scale) for index in indices]

    def processed_size(self, index: int) -> tuple[int, int]:
        """Size (H, W) of sample `index` when nothing is changed at random."""
        record = self.data.records[index]
        return self.processor.output_size(record.height, record.width)

    def _scale(self, index: int) -> int | None:
        scales = self.augment.scales if self.augment else ()
        return int(self._generator(index, _SCALE_KEY).choice(scales)) if scales else None

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(self._epoch), *key))

    def _sample(self, index: int, scale: int | None) -> Sample:
        record = self.data.records[index]
        pixels = to_tensor(read_image(record.image, (record.height, record.width)))  # (3, H, W)
        chosen = torch.from_numpy(~record.crowd)
        boxes = torch.from_numpy(record.boxes)[chosen].float()  # (T, 4)
        if self.augment is None:
            boxes, kept = inside(boxes, *pixels.shape[-2:])
        else:
            pixels, boxes, kept = changed(pixels, boxes, self.augment, self._generator(index))
        height, width = pixels.shape[-2:]
        parts = xyxy_to_cxcywh(boxes / boxes.new_tensor([width, height, width, height]))
        labels = torch.from_numpy(record.labels)[chosen][kept]
        return Sample(
            pixel_values=self._prepared(pixels, self._size(height, width, scale)),
            labels={"class_labels": self._class_index[labels], "boxes": parts},
            image_id=record.image_id,
            size=(record.height, record.width),
            pad_to=self.processor.pad_to,
        )

    def _prepared(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        return normalize(resize(pixels, size, self.processor), self.processor)

    def _size(self, height: int, width: int, scale: int | None) -> tuple[int, int]:
        """What an image of height x width is resized to: a scale replaces the square or the shortest side."""
        if scale is None:
            return self.processor.output_size(height, width)
        if self.processor.size is not None:
            return scale, scale
        return replace(self.processor, shortest=scale).output_size(height, width)


def collate(samples: Sequence[Sample]) -> Batch:
    """The samples as one batch, padded with zeros at the right and bottom to the largest, or to `pad_to`."""
    height, width = _padded_size(samples)
    pixels = torch.zeros(len(samples), 3, height, width)  # (B, 3, H, W)
    mask = torch.zeros(len(samples), height, width, dtype=torch.int64)  # (B, H, W)
    for i, sample in enumerate(samples):
        h, w = sample.pixel_values.shape[-2:]
        pixels[i, :, :h, :w] = sample.pixel_values
        mask[i, :h, :w] = 1
    return Batch(
        pixel_values=pixels,
        pixel_mask=mask,
        labels=[sample.labels for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        sizes=torch.tensor([sample.size for sample in samples], dtype=torch.int64).reshape(-1, 2),  # (B, 2)
    )


def _padded_size(samples: Sequence[Sample]) -> tuple[int, int]:
    pad = max((sample.pad_to or 0 for sample in samples), default=0)
    sizes = [sample.pixel_values.shape[-2:] for sample in samples]
    return max([pad, *(h for h, _ in sizes)]), max([pad, *(w for _, w in sizes)])


def same_size_batches(image_set: ImageSet, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Batches without padding, for calibration: images of one processed size together, in the order given.

    The last batch of a size may be smaller. Random changes are not meant here: `image_set` has no augment.
    """
    assert image_set.augment is None, "calibration sees images as they are"
    groups: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        groups.setdefault(image_set.processed_size(index), []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            samples = [image_set[index] for index in group[start : start + batch_size]]
            yield collate([replace(sample, pad_to=None) for sample in samples])
