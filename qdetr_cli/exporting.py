"""From a model to a file that runs: written beside its place, run, compared, and only then put there."""

import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdetr_cli.artefact import open_artefact
from qdetr_cli.comparison import both_metrics, compared, sample
from qdetr_cli.data import DetectionData
from qdetr_cli.errors import ExportError, RunError
from qdetr_cli.export.floats import explained
from qdetr_cli.export.kernels import Kernels
from qdetr_cli.export.metadata import Metadata
from qdetr_cli.instructions import sums_overflow
from qdetr_cli.models import Model, parse_size, save_packed, trace_size, versions
from qdetr_cli.recipe import Export
from qdetr_cli.results import Exported, Listener
from qdetr_cli.rewrite import set_enabled
from qdetr_cli.runs import check_file, check_new, draft_files
from qdetr_cli.sessions import KEY, TITLES, package

Size = tuple[int, int]

ANY = "any"  # what --size and --batch call a free dimension
SPARE = 1.5  # how many times the size of the weights in float must be free on the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kind of file that qdetr writes."""

    suffix: str  # "" for a folder
    companions: tuple[str, ...] = ()  # suffixes of the files beside it
    packages: tuple[str, ...] = ()  # of the extra [export] that writing and running it take


TARGETS = {
    "onnx": Target(suffix=".onnx", packages=("onnx", "onnxscript", "onnxruntime")),
    "openvino": Target(suffix=".xml", companions=(".bin",), packages=("onnx", "onnxscript", "openvino")),
    "packed": Target(suffix=""),
}


def exported_file(
    model: Model,
    to: str,
    out: Path,
    size: Size,
    data: DetectionData | None,
    threads: int | None,
    *,
    batch: int | None,
    any_size: bool,
    portable: bool | None,
    began: float,
    listener: Listener,
) -> Exported:
    """Write `out`, run it and compare it with the model. Raises ExportError if it differs: nothing stays.

    `any_size`: `size` is one of the sizes that the file takes.
    """
    target = TARGETS[to]
    at = "for any size" if any_size else f"at {size[0]}x{size[1]}"
    portable = model.plan is not None and (sums_overflow() if portable is None else portable)
    form = ", so that no sum overflows without VNNI (--portable)" if portable else ""
    listener.say(f"exporting {at}{form}, and comparing the file with the model")
    with draft_files(out, target.companions) as draft:
        write(model, to, size, draft, batch=batch, any_size=any_size, portable=portable)
        artefact = open_artefact(draft, threads)
        parity = compared(model, artefact, sample(artefact.detector.processor, data, size))
        metrics = {} if data is None else both_metrics(model, artefact, data, listener)
        used = kernels(to, draft, size)
    floats = explained(used, model.plan, narrow=portable and to == "openvino")
    for each in floats:
        if not each.reason:
            listener.say(
                f"WARNING: {each.path} is planned in integers, and {TITLES[used.runtime]} runs its "
                f"{each.operation.kind} in float ({each.operation.kernel})"
            )
    files = (out, *(out.with_suffix(each) for each in target.companions))
    return Exported(
        to=to,
        files=files,
        quantized=model.plan is not None,
        size=None if any_size else size,
        bytes=sum(each.stat().st_size for each in files),
        float_bytes=float_bytes(model),
        kernels=used,
        floats=floats,
        parity=parity,
        metrics=metrics,
        seconds=time.perf_counter() - began,
        versions=versions(),
    )


def packed_folder(model: Model, out: Path, began: float) -> Exported:
    """Write the folder `out` with the weights as integers at their width."""
    save_packed(model, out)
    files = tuple(sorted(out.iterdir()))
    return Exported(
        to="packed",
        files=files,
        quantized=True,
        size=None,
        bytes=sum(each.stat().st_size for each in files),
        float_bytes=float_bytes(model),
        kernels=None,
        floats=(),
        parity=None,
        metrics={},
        seconds=time.perf_counter() - began,
        versions=versions(),
    )


def check_target(to: str, out: Path) -> Target:
    """The kind of file. Raises ExportError or RunError for what can be known to fail before anything slow."""
    if to not in TARGETS:
        raise ExportError(f"--to {to}: is not one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    for name in target.packages:
        package(name, f"--to {to}")
    if not target.suffix:
        check_new(out)
        return target
    if out.suffix.lower() != target.suffix:
        raise ExportError(f"--out {out}: --to {to} writes a file whose name ends in {target.suffix}")
    check_file(out, target.companions)
    return target


def told(model: Model | None) -> Export:
    """What the recipe of a model says of its export; a float model has none."""
    return Export() if model is None or model.recipe is None else model.recipe.export


def parse_batch(text: str) -> int | None:
    """The number of images of the file, None for any. Raises ExportError for anything else."""
    if text == ANY:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ExportError(f"--batch {text}: is not a number of images, nor {ANY}")
    return int(text)


def parse_export_size(text: str | None) -> tuple[Size | None, bool]:
    """The (H, W) that is asked for, and whether a file for any size is. Raises RunError for anything else."""
    return (None, True) if text == ANY else (parse_size(text, ANY), False)


def refuse_settings(to: str, given: Mapping[str, bool]) -> None:
    """Raise ExportError that names the settings that were given and would have no effect."""
    idle = [name for name, used in given.items() if used]
    if idle:
        raise ExportError(f"--to {to}: {', '.join(idle)} would have no effect; leave it out")


def export_size(model: Model, given: Size | None) -> Size:
    """The (H, W) of the file: as given, else that of the plan. Raises ExportError for what cannot be."""
    planned = None if model.facts is None else model.facts.size
    size = given or planned or trace_size(model)
    step = max(model.family.divisible(model.module.config), model.detector.processor.divisor)
    if any(side % step for side in size):
        near = "x".join(str(max(step, round(side / step) * step)) for side in size)
        raise ExportError(
            f"--size {size[0]}x{size[1]}: this {model.family.name} needs multiples of {step}; "
            f"for example {near}"
        )
    return size


def check_space(out: Path, model: Model) -> None:
    """Raise RunError where the disk cannot hold the file."""
    folder = next(each for each in out.resolve().parents if each.exists())
    wanted, free = SPARE * float_bytes(model), shutil.disk_usage(folder).free
    if free < wanted:
        raise RunError(
            f"{folder}: {free / 1e6:.0f} MB are free, and writing {out.name} may take {wanted / 1e6:.0f} MB; "
            "free some space, or choose another --out"
        )


def float_bytes(model: Model) -> int:
    """What the weights and biases of the model take as float32."""
    named = model.module.named_parameters()
    return sum(
        4 * p.numel() for name, p in named if not name.endswith(("_quantizer.step", "_quantizer.offset"))
    )


def write(
    model: Model,
    to: str,
    size: Size,
    path: Path,
    *,
    batch: int | None = 1,
    quantized: bool = True,
    any_size: bool = False,
    portable: bool | None = None,
) -> None:
    """Write the model for `batch` images (None: any) of `size`; `quantized` off: its float weights.

    `any_size`: for images of other sizes too. `portable`: exact without VNNI too; None: on this processor.
    """
    import onnx

    from qdetr_cli.export.onnx_graph import marked, with_pairs
    from qdetr_cli.export.program import exported

    with nullcontext() if quantized or model.plan is None else _float_mode(model), _silent():
        graph = marked(exported(model.module, size, batch=batch, any_size=any_size))
    portable = sums_overflow() if portable is None else portable
    told = metadata_of(model, None if any_size else size, quantized=quantized)
    text = replace(told, portable=portable and told.quantized).to_json()
    if to == "onnx":
        from qdetr_cli.export.ort.prepare import prepared

        file = prepared(with_pairs(graph), portable=portable)
        file.metadata_props.add(key=KEY, value=text)
        onnx.save(file, path)
    else:
        from qdetr_cli.export.openvino_graph import openvino_model

        network = openvino_model(graph, portable=portable)
        network.set_rt_info(text, [KEY])
        _saved(network, path)


def metadata_of(model: Model, size: Size | None, *, quantized: bool) -> Metadata:
    """What a file says of itself."""
    detector = model.detector
    return Metadata(
        family=model.family.name,
        class_names=detector.class_names,
        processor=detector.processor.to_config(),
        size=size,
        recipe=model.recipe.to_dict() if quantized and model.recipe is not None else None,
        source=Path(detector.source).name,
        versions=versions(),
    )


def _saved(network: Any, path: Path) -> None:
    """Write .xml and .bin. Raises OSError where the disk is full, which OpenVINO may not notice."""
    try:
        package("openvino", "--to openvino").save_model(network, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f"OpenVINO: {str(error).strip().splitlines()[-1]}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """A block in which the exporter of torch does not tell of its steps."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def kernels(to: str, path: Path, size: Size) -> Kernels:
    """What of the file runs on integer kernels for images of `size`, as the runtime's profile says."""
    if to == "onnx":
        from qdetr_cli.export.ort.profile import kernels as executed

        return executed(path, size)
    from qdetr_cli.export.openvino_profile import kernels as compiled

    return compiled(path)


@contextmanager
def _float_mode(model: Model) -> Iterator[Model]:
    """The model with every quantizer off, for the duration of the block."""
    set_enabled(model.module, None, False)
    try:
        yield model
    finally:
        set_enabled(model.module, None, True)
