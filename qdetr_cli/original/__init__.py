"""Checkpoints of the original repositories -> config and state dict of transformers, in memory.

One module for each repository; `layouts` tells them apart by their keys.
"""

from pathlib import Path
from typing import TypedDict, Unpack

from qdetr_cli.original.layouts import Layout, layouts, read_content
from qdetr_cli.original.names import Original, OriginalFile
from qdetr_cli.original.pickles import read_pickle

__all__ = ["Layout", "Original", "OriginalFile", "Settings", "layouts", "read_original"]


class Settings(TypedDict, total=False):
    """What a user may say of a file that does not say it itself; None says nothing."""

    heads: int | None  # of self-attention
    dilation: bool | None  # DETR's DC5
    pre_norm: bool | None  # DETR
    queries: int | None  # the RT-DETR line: how many are chosen from the image
    decoder_layers: (
        int | None
    )  # the RT-DETR line: the layer that predicts, counted from 1; later ones are left out
    decoder_method: str | None  # RT-DETRv2, D-FINE: default or discrete sampling
    windows: int | None  # RF-DETR: on each side of the image
    resolution: int | None  # RF-DETR: the side that images are resized to
    weights: str | None  # where they lie: model, ema.module, ema_model


def read_original(path: Path, **settings: Unpack[Settings]) -> Original:
    """The model of a `.pth` of one of the original repositories.

    Raises CheckpointError for other layouts, for pickles that run code, and for a setting that contradicts
    the file or that its layout does not have.
    """
    return read_content(path, read_pickle(path), settings)
