"""The files that race: a detector with random weights, exported by qdetr, and as other tools quantize it.

Files are made once and kept: `<folder>/<model>/`. All are of one image of one size, and none takes a mask.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import onnx
import openvino
import torch

from benchmarks.detectors import batch, fake_quant, random_detector
from benchmarks.peers import PEERS
from qdetr_cli.export.kernels import Kernels
from qdetr_cli.export.onnx_graph import marked, with_pairs
from qdetr_cli.export.openvino_graph import openvino_model
from qdetr_cli.export.openvino_profile import kernels as openvino_kernels
from qdetr_cli.export.ort.prepare import prepared
from qdetr_cli.export.ort.profile import kernels as onnxruntime_kernels
from qdetr_cli.export.program import Program, exported
from qdetr_cli.sessions import PIXELS, SUFFIXES

IMAGES = 1  # of noise, for calibration
FLOAT = "float"
RECIPES = {
    "qdetr w8a8": "w8a8",
    "qdetr w4a4": "w4a4",
    "qdetr w4a4, residual sums at 8 bits": "best_w4a4_sums",
}
RIVALS = ("onnxruntime static, MinMax", "nncf", "nncf transformer")
SUFFIX: dict[str, str] = {runtime: suffix for suffix, runtime in SUFFIXES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Raced:
    """A file: of whom, where, how large, and how many layers of each kind run on integer kernels, of all."""

    name: str
    runtime: str
    file: str  # in the folder of the model
    megabytes: float
    integer: dict[str, tuple[int, int]]


def raced(model: str, runtimes: Sequence[str], side: int, folder: Path) -> list[tuple[Raced, Path]]:
    """Every file of a model for these runtimes, made where it is not there."""
    own = folder / f"{model}-{side}"
    own.mkdir(parents=True, exist_ok=True)
    return [
        (_card(name, runtime, path, model, side), path)
        for name in (FLOAT, *RIVALS, *RECIPES)
        for runtime in runtimes
        for path in [own / f"{name}{SUFFIX[runtime]}"]
        if name not in RIVALS or PEERS[name].suffix == path.suffix
    ]


def _card(name: str, runtime: str, path: Path, model: str, side: int) -> Raced:
    """What is known of a file, kept beside it."""
    told = path.with_name(path.name + ".json")
    if not told.exists():
        _make(name, path, model, side)
        parts = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
        found = _kernels(runtime)(path)
        card = Raced(
            name=name,
            runtime=runtime,
            file=path.name,
            megabytes=round(sum(each.stat().st_size for each in parts) / 1e6, 2),
            integer={kind: found.count(kind) for kind in found.kinds()},
        )
        told.write_text(json.dumps(asdict(card)), encoding="utf-8")
        print(f"made {path.parent.name}: {card}", flush=True)
    return Raced(**json.loads(told.read_text(encoding="utf-8")))


def _make(name: str, path: Path, model: str, side: int) -> None:
    plain = path.with_name("plain.onnx")  # before any pass for a runtime
    if not plain.exists():
        onnx.save(with_pairs(marked(_program(model, FLOAT, side))), plain)
    if name in RIVALS:
        feeds = [{PIXELS: image[None].numpy()} for image in batch(IMAGES, side).pixel_values]
        PEERS[name].write(plain, feeds, path)
        return
    graph = marked(_program(model, name, side))
    if path.suffix == ".onnx":
        onnx.save(prepared(with_pairs(graph)), path)
    else:
        openvino.save_model(openvino_model(graph), path, compress_to_fp16=False)


@lru_cache(maxsize=1)  # a file for each runtime comes of one program
def _program(model: str, name: str, side: int) -> Program:
    """The detector, in float or calibrated under a recipe, as `torch.export` gives it."""
    torch.manual_seed(0)
    detector, images = random_detector(model), batch(IMAGES, side)
    module = detector.model if name == FLOAT else fake_quant(detector, RECIPES[name], images)
    return exported(module.eval(), (side, side), mask=False)


def _kernels(runtime: str) -> Callable[[Path], Kernels]:
    return onnxruntime_kernels if runtime == "onnxruntime" else openvino_kernels
