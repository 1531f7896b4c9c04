"""Imported for its effect: the process has exported the tiny DETR, and those that it forks need not."""

import tempfile
from pathlib import Path

from tiny_runs import Told, write_model, write_voc

from qdetr_cli import pipeline
from qdetr_cli.models import Source
from qdetr_cli.results import DataSource

with tempfile.TemporaryDirectory() as folder:
    pipeline.quantize(
        Source(str(write_model(Path(folder) / "detr"))),
        recipe="w4a4",
        data=DataSource(write_voc(Path(folder) / "voc", "0123456789", [(64, 64)] * 8)),
        out=Path(folder) / "quantized",
        overrides=("calibrate.images=4", "train.workers=0"),
        measured=False,
        listener=Told(),
    )
