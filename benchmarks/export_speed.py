"""Latency in ONNX Runtime of exported files: float, its own static quantization of that, and ours; ratios.

    python -m benchmarks.export_speed --model detr_r50 --recipes w8a8 w4a4 --threads 2

Random weights, one image. The other quantization is `quantize_static`: pairs of QuantizeLinear and
DequantizeLinear, uint8 by int8, per channel, of Conv, MatMul and Gemm. Runs take turns, so that whatever else
the machine does meets all files alike; times are medians of seconds on the clock and of processor time.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.step_time import batch, detr_r50, fake_quant
from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.export.onnx_graph import marked, with_pairs
from qdetr_cli.export.ort.prepare import prepared
from qdetr_cli.export.ort.profile import kernels
from qdetr_cli.export.program import exported

OPERATIONS = ("Conv", "MatMul", "Gemm")
RT_DETR: dict[str, dict[str, Any]] = {
    "rt_detr_r18": {
        "backbone": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
        "detector": {
            "decoder_layers": 3,
            "encoder_in_channels": [128, 256, 512],
            "hidden_expansion": 0.5,
        },
    },
    "rt_detr_r50": {
        "backbone": {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
        "detector": {},
    },
}
MODELS = ("detr_r50", *RT_DETR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One file: median seconds, and how many times as fast as the float file it is."""

    name: str
    seconds: float
    processor_seconds: float
    speedup: float
    megabytes: float
    integer: dict[str, tuple[int, int]]  # of each kind of layer: on integer kernels, all


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="detr_r50")
    parser.add_argument("--recipes", nargs="+", default=["w8a8"])
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = dict(written(arguments.model, arguments.recipes, arguments.side, Path(folder)))
        rows = measured(files, arguments.side, arguments.threads, arguments.runs)
    for row in rows:
        print(f"{row.name:12} {1000 * row.seconds:8.1f} ms {row.speedup:6.2f} x float  {row.integer}")
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")


def written(model: str, recipes: list[str], side: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """The name and place of each file, as they are made."""
    detector = detr_r50() if model == "detr_r50" else rt_detr(model)
    size, images = (side, side), batch(1, side)
    plain = folder / "float.onnx"
    onnx.save(with_pairs(marked(exported(detector.model.eval(), size, mask=False))), plain)
    yield "float", plain
    yield "static U8S8", static(plain, images.pixel_values, folder)
    for recipe in recipes:
        path = folder / f"{recipe}.onnx"
        module = fake_quant(detector, recipe, images).eval()
        onnx.save(prepared(with_pairs(marked(exported(module, size, mask=False)))), path)
        yield recipe, path


def rt_detr(name: str) -> Detector:
    """RT-DETR with random weights."""
    stages = ["stage2", "stage3", "stage4"]
    backbone = transformers.RTDetrResNetConfig(out_features=stages, **RT_DETR[name]["backbone"])
    config = transformers.RTDetrConfig(backbone_config=backbone, **RT_DETR[name]["detector"])
    return load_config_model(config.to_dict(), None)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixel_values: torch.Tensor) -> None:
        self.images = iter([{"pixel_values": pixel_values.numpy()}])

    def get_next(self) -> Any:
        return next(self.images, None)


def static(plain: Path, pixel_values: torch.Tensor, folder: Path) -> Path:
    """ONNX Runtime's own quantization of a float file."""
    ready, path = folder / "ready.onnx", folder / "static.onnx"
    quant_pre_process(plain, ready, skip_symbolic_shape=True)
    quantize_static(
        ready,
        path,
        _Images(pixel_values),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=list(OPERATIONS),
    )
    return path


def measured(files: dict[str, Path], side: int, threads: int, runs: int) -> list[Row]:
    """The rows of the table."""
    sessions = {name: _session(path, threads) for name, path in files.items()}
    given = {"pixel_values": batch(1, side).pixel_values.numpy()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for turn in range(runs + 1):
        for name, session in sessions.items():
            began, worked = time.perf_counter(), time.process_time()
            session.run(None, given)
            if turn:
                taken[name].append((time.perf_counter() - began, time.process_time() - worked))
    medians = {
        name: tuple(statistics.median(each) for each in zip(*times, strict=True))
        for name, times in taken.items()
    }
    return [
        Row(
            name=name,
            seconds=medians[name][0],
            processor_seconds=medians[name][1],
            speedup=medians["float"][0] / medians[name][0],
            megabytes=path.stat().st_size / 1e6,
            integer={kind: found.count(kind) for kind in found.kinds()},
        )
        for name, path in files.items()
        for found in (kernels(path),)
    ]


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
