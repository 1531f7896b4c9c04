"""Other tools' 8-bit quantization of a float ONNX file that qdetr wrote, each by its own means.

ONNX Runtime: `quantize_static`, pairs of QuantizeLinear and DequantizeLinear, uint8 by int8, per channel, of
Conv, MatMul and Gemm. NNCF: `nncf.quantize` of the file in OpenVINO. Both see the same float model and the
same images; what qdetr wrote into the file stays in theirs, so that the same code runs and measures all.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from qdetr_cli.sessions import KEY

Feed = Mapping[str, NDArray[Any]]  # the inputs of a file by name, for one image

OPERATIONS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another tool's quantization: `write(plain, images, out)` makes a file of the float file `plain`."""

    suffix: str  # of the file
    write: Callable[[Path, Sequence[Feed], Path], None]


def onnxruntime_static(method: str) -> Callable[[Path, Sequence[Feed], Path], None]:
    """ONNX Runtime's own quantization, its ranges by `method` of CalibrationMethod."""

    def write(plain: Path, images: Sequence[Feed], out: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(plain, ready, skip_symbolic_shape=True)
            quantize_static(
                ready,
                out,
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(OPERATIONS),
                calibrate_method=CalibrationMethod[method],
            )
        file = onnx.load(out)
        del file.metadata_props[:]
        onnx.helper.set_model_props(file, {KEY: metadata(plain)})
        onnx.save(file, out)

    return write


def nncf(*, transformer: bool, fast_bias: bool = True) -> Callable[[Path, Sequence[Feed], Path], None]:
    """NNCF's quantization in OpenVINO, by default or in its mode for transformers."""

    def write(plain: Path, images: Sequence[Feed], out: Path) -> None:
        import nncf as library  # type: ignore[import-untyped]

        library.set_log_level("ERROR")
        model = library.quantize(
            openvino.Core().read_model(plain),
            library.Dataset(list(images)),
            subset_size=len(images),
            model_type=library.ModelType.TRANSFORMER if transformer else None,
            fast_bias_correction=fast_bias,
        )
        model.set_rt_info(metadata(plain), [KEY])
        openvino.save_model(model, out, compress_to_fp16=False)

    return write


PEERS = {
    "onnxruntime static, MinMax": Peer(suffix=".onnx", write=onnxruntime_static("MinMax")),
    "onnxruntime static, Entropy": Peer(suffix=".onnx", write=onnxruntime_static("Entropy")),
    "onnxruntime static, Percentile": Peer(suffix=".onnx", write=onnxruntime_static("Percentile")),
    "nncf": Peer(suffix=".xml", write=nncf(transformer=False)),
    "nncf transformer": Peer(suffix=".xml", write=nncf(transformer=True)),
    "nncf, slow bias": Peer(suffix=".xml", write=nncf(transformer=False, fast_bias=False)),
    "nncf transformer, slow bias": Peer(suffix=".xml", write=nncf(transformer=True, fast_bias=False)),
}


def metadata(path: Path) -> str:
    """What qdetr wrote of itself into an ONNX file; nothing of one that has none."""
    properties = onnx.load(path, load_external_data=False).metadata_props
    return next((str(each.value) for each in properties if each.key == KEY), "")


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Images one by one, as ONNX Runtime asks for them."""

    def __init__(self, images: Sequence[Feed]) -> None:
        self._images: Iterator[Feed] = iter(images)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        image = next(self._images, None)
        return None if image is None else {name: np.ascontiguousarray(each) for name, each in image.items()}
