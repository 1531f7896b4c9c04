"""qdetr: low-bit quantization-aware training for DETR detectors."""

__version__ = "0.1.0"
