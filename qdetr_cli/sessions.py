"""Exported files that run: `.onnx` in ONNX Runtime, `.xml` with its `.bin` in OpenVINO, on the CPU.

numpy in and out, and no torch: a process that measures a runtime's memory should hold nothing else.

Shape letters: B images, H W pixels, Q queries, C classes.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qdetr_cli.errors import ExportError

Runtime = Literal["onnxruntime", "openvino"]
SUFFIXES: dict[str, Runtime] = {".onnx": "onnxruntime", ".xml": "openvino"}
TITLES: dict[str, str] = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
KEY = "qdetr"  # of the metadata that qdetr writes into a file
PIXELS, MASK = "pixel_values", "pixel_mask"
LOGITS, BOXES = "logits", "pred_boxes"
INSTALL = 'pip install "qdetr[export]"'
LARGEST = 2**27  # pixels of all images together that a file may ask for: 8 of 4096x4096


class Outputs(NamedTuple):
    """What a detector says of B images, as its family's model gives it."""

    logits: NDArray[np.float32]  # (B, Q, C)
    pred_boxes: NDArray[np.float32]  # (B, Q, 4) cxcywh in 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a file takes. None stands for any number of images, and for any size."""

    batch: int | None
    size: tuple[int, int] | None  # (H, W)
    mask: np.dtype[Any] | None  # the type of `pixel_mask` (B, H, W), 1 for image; None: it takes none

    def feed(self, pixels: NDArray[np.float32], mask: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
        """The arrays by name. A file that takes a mask and is given none sees the whole of each image."""
        if self.mask is None:
            return {PIXELS: pixels}
        whole = np.ones((pixels.shape[0], *pixels.shape[2:]), dtype=self.mask) if mask is None else mask
        return {PIXELS: pixels, MASK: np.ascontiguousarray(whole, dtype=self.mask)}


class Session(Protocol):
    """A file that is loaded and runs."""

    runtime: Runtime
    metadata: str | None  # the JSON that qdetr wrote into it; None: the file is not qdetr's
    inputs: Inputs
    classes: int | None  # C of its logits; None: it does not say

    def run(self, pixels: NDArray[np.float32], mask: NDArray[Any] | None = None) -> Outputs:
        """Logits and boxes of `pixels` (B, 3, H, W), of which `mask` (B, H, W) says what is no padding."""


def is_exported(path: str | Path) -> bool:
    """True for what is written as the path of an exported file, whether it is there or not."""
    return Path(path).suffix.lower() in SUFFIXES


def runtime_of(path: Path) -> Runtime:
    """The runtime of a file. Raises ExportError for a suffix that none has."""
    if not is_exported(path):
        raise ExportError(
            f"{path}: no runtime is known for {path.suffix or 'a file without a suffix'}; "
            ".onnx runs in ONNX Runtime, .xml (with its .bin) in OpenVINO"
        )
    return SUFFIXES[path.suffix.lower()]


def available(runtime: str) -> bool:
    """True where the package of a runtime is installed."""
    return importlib.util.find_spec(runtime) is not None


def package(name: str, needed_by: str) -> Any:
    """The module `name` of the extra `[export]`. Raises ExportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"{needed_by} needs {TITLES.get(name, name)}: {INSTALL}") from error


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(path: Path, threads: int | None = None) -> Session:
    """The file, loaded to run on `threads` cores, on all that there are by default. Raises ExportError."""
    runtime = runtime_of(path)
    weights = [path.with_suffix(".bin")] if runtime == "openvino" else []
    for part in (path, *weights):
        if not part.is_file():
            beside = f"; {path.name} needs it beside it" if part in weights else ""
            raise ExportError(f"{part}: there is no such file{beside}")
    kind = OnnxRuntimeSession if runtime == "onnxruntime" else OpenVinoSession
    return kind(path, threads or cores())


class OnnxRuntimeSession:
    """An ONNX file in ONNX Runtime's CPU provider."""

    runtime: Runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int) -> None:
        package = _package("onnxruntime", path)
        options = package.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores
        try:
            self._session = package.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            self.metadata: str | None = self._session.get_modelmeta().custom_metadata_map.get(KEY)
            shapes = {each.name: each.shape for each in self._session.get_inputs()}
            kinds = {each.name: _NUMPY.get(each.type) for each in self._session.get_inputs()}
            outputs = {each.name: each.shape for each in self._session.get_outputs()}
        except Exception as error:  # of many types, none of them public
            raise _unreadable(path, "ONNX Runtime", error) from error
        self._path = path
        self.inputs = _inputs(path, shapes, kinds, list(outputs))
        self.classes = _classes(outputs[LOGITS])

    def run(self, pixels: NDArray[np.float32], mask: NDArray[Any] | None = None) -> Outputs:
        """See Session."""
        try:
            found = self._session.run([LOGITS, BOXES], self.inputs.feed(pixels, mask))
        except Exception as error:
            raise _unreadable(self._path, "ONNX Runtime", error, "run") from error
        return _outputs(self._path, found, len(pixels))


class OpenVinoSession:
    """An OpenVINO model on the CPU. Float parts are float32: with AMX it would take bfloat16 by itself."""

    runtime: Runtime = "openvino"

    def __init__(self, path: Path, threads: int) -> None:
        openvino = _package("openvino", path)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        core = openvino.Core()
        try:
            model = core.read_model(path)
            known = model.has_rt_info([KEY])
            self.metadata: str | None = str(model.get_rt_info([KEY]).value) if known else None
            shapes = {_name(each): _openvino_shape(each) for each in model.inputs}
            kinds = {_name(each): each.element_type.to_dtype() for each in model.inputs}
            outputs = {_name(each): _openvino_shape(each) for each in model.outputs}
            self._path = path
            self.inputs = _inputs(path, shapes, kinds, list(outputs))
            self.classes = _classes(outputs[LOGITS])
            self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        except ExportError:
            raise
        except Exception as error:  # of many types where the file is damaged
            raise _unreadable(path, "OpenVINO", error) from error

    def run(self, pixels: NDArray[np.float32], mask: NDArray[Any] | None = None) -> Outputs:
        """See Session."""
        try:
            self._request.infer(self.inputs.feed(pixels, mask), share_inputs=True)
            found = [self._request.get_tensor(name).data.copy() for name in (LOGITS, BOXES)]
        except Exception as error:
            raise _unreadable(self._path, "OpenVINO", error, "run") from error
        return _outputs(self._path, found, len(pixels))


_NUMPY: dict[str, np.dtype[Any]] = {
    f"tensor({name})": np.dtype(kind)
    for name, kind in {"float": "f4", "int64": "i8", "int32": "i4", "uint8": "u1", "bool": "?"}.items()
}


def _inputs(
    path: Path,
    shapes: Mapping[str, list[Any]],
    kinds: Mapping[str, np.dtype[Any] | None],
    outputs: list[str],
) -> Inputs:
    """What the file takes. Raises ExportError for a file that is no detector as qdetr writes them."""
    fits = PIXELS in shapes and set(shapes) <= {PIXELS, MASK} and {LOGITS, BOXES} <= set(outputs)
    if not fits or len(shapes[PIXELS]) != 4:
        raise ExportError(
            f"{path}: is no detector that qdetr exported: it takes {', '.join(shapes)} and gives "
            f"{', '.join(outputs)}; wanted are {PIXELS} (and {MASK}) to {LOGITS} and {BOXES}. "
            "Write it with `qdetr export`"
        )
    batch, _, height, width = (side if isinstance(side, int) else None for side in shapes[PIXELS])
    size = None if height is None or width is None else (height, width)
    asked = [each or 1 for each in (batch, height, width)]
    if min(asked) < 1 or math.prod(asked) > LARGEST:
        raise ExportError(f"{path}: takes {' x '.join(map(str, asked))} pixels, more than qdetr makes")
    return Inputs(batch=batch, size=size, mask=kinds[MASK] if MASK in shapes else None)


def _classes(shape: list[Any]) -> int | None:
    """C of logits (B, Q, C), where the file says it."""
    return shape[2] if len(shape) == 3 and isinstance(shape[2], int) else None


def _outputs(path: Path, found: Sequence[Any], images: int) -> Outputs:
    """Logits and boxes. Raises ExportError where they are not those of so many images."""
    logits, boxes = (np.asarray(each) for each in found)
    if logits.ndim != 3 or len(logits) != images or boxes.shape != (*logits.shape[:2], 4):
        raise ExportError(
            f"{path}: gives {LOGITS} {logits.shape} and {BOXES} {boxes.shape} for {images} images, where "
            "(images, queries, classes) and (images, queries, 4) are wanted; export it again"
        )
    return Outputs(logits, boxes)


def _name(port: Any) -> str:
    """The name of an input or output of OpenVINO that qdetr knows, else any."""
    names = sorted(port.get_names())
    return next((each for each in names if each in (PIXELS, MASK, LOGITS, BOXES)), names[0] if names else "?")


def _openvino_shape(port: Any) -> list[int | None]:
    return [None if side.is_dynamic else side.get_length() for side in port.partial_shape]


def _package(name: str, path: Path) -> Any:
    return package(name, f"{path}: running {path.suffix} files")


def _unreadable(path: Path, runtime: str, error: Exception, what: str = "load") -> ExportError:
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check "))]
    reason = told[0] if told else type(error).__name__
    return ExportError(f"{path}: {runtime} cannot {what} it ({reason[:300]}); export it again")
