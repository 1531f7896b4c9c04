"""Detection data sets: VOC and COCO on disk -> records -> samples -> batches."""

from qdetr_cli.data.batches import Batch, ImageSet, Sample, collate, same_size_batches
from qdetr_cli.data.images import ImageError, Processor, prepare_image, read_image
from qdetr_cli.data.loose import image_files, single_image
from qdetr_cli.data.opening import check_images, open_data
from qdetr_cli.data.records import DetectionData, Record

__all__ = [
    "Batch",
    "DetectionData",
    "ImageError",
    "ImageSet",
    "Processor",
    "Record",
    "Sample",
    "check_images",
    "collate",
    "image_files",
    "open_data",
    "prepare_image",
    "read_image",
    "same_size_batches",
    "single_image",
]
