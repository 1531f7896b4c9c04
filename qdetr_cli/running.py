"""A model at work, a folder or an exported file: measured on data, or asked what is on images."""

from collections.abc import Sequence
from pathlib import Path

import torch

from qdetr_cli import plugins
from qdetr_cli.artefact import open_artefact
from qdetr_cli.data import DetectionData, ImageSet, image_files, single_image
from qdetr_cli.devices import torch_device
from qdetr_cli.errors import CheckpointError, RunError
from qdetr_cli.evaluate import Bench, Rung, detect, detect_all
from qdetr_cli.evaluate import ladder as climb
from qdetr_cli.metrics import measure
from qdetr_cli.models import Model, Source, known_classes, open_model
from qdetr_cli.plugins import load as load_plugins
from qdetr_cli.processes import from_first, jointly
from qdetr_cli.results import DataSource, Evaluated, Listener, PredictedImage
from qdetr_cli.runs import check_new
from qdetr_cli.sessions import is_exported
from qdetr_cli.splits import open_split


@jointly
def evaluate(
    source: Source,
    *,
    data: DataSource,
    ladder: bool = False,
    batch_size: int = 16,
    workers: int = 2,
    metrics: tuple[str, ...] = (),
    out: Path | None = None,
    threads: int | None = None,
    plugins: Sequence[Path] = (),
    device: str = "auto",
    listener: Listener,
) -> Evaluated:
    """AP on a split, and with `ladder` the AP as module groups are quantized one after another.

    `out`, where the caller will write, and the metric plugins are checked before anything slow.
    """
    load_plugins(plugins)
    _check_metrics(metrics)
    if out is not None:
        from_first(lambda: check_new(out))
    where = _device(source, device)
    evaluation = open_split(data, data.split, listener)
    model = _runnable(source, threads, listener)
    if ladder and (model.plan is None or model.packed):
        raise RunError(_nothing_to_switch(source, packed=model.packed))
    bench = bench_of(model, evaluation, batch_size=batch_size, workers=workers, metrics=metrics)
    model.module.to(where)
    rungs: tuple[Rung, ...] = ()
    with listener.progress("ladder" if ladder else "evaluate", len(bench.images)) as advance:
        if ladder and model.plan is not None:
            rungs, found = climb(model.module, model.family, model.plan, bench, device=where, advance=advance)
        else:
            found = detect_all(model.module, model.family, bench, device=where, advance=advance)
    return Evaluated(
        metrics=from_first(lambda: measure(evaluation, found, metrics)),
        detections=tuple(found),
        category_ids=evaluation.category_ids,
        images=len(bench.images),
        split=data.split,
        ladder=rungs,
        warnings=dict(evaluation.warnings),
    )


def predict(
    source: Source,
    paths: Sequence[Path],
    *,
    threshold: float = 0.5,
    out: Path | None = None,
    threads: int | None = None,
    plugins: Sequence[Path] = (),
    device: str = "auto",
    listener: Listener,
) -> tuple[PredictedImage, ...]:
    """The objects on images, and on all images of folders. `out`, where the caller will write, is checked."""
    load_plugins(plugins)
    if out is not None:
        check_new(out)
    where = _device(source, device)
    files = image_files(paths)
    model = _runnable(source, threads, listener)
    model.module.to(where)
    with listener.progress("predict", len(files)) as advance:
        found = []
        for file in files:
            found.append(_predicted(model, file, threshold, where))
            advance(1)
    return tuple(found)


def bench_of(
    model: Model,
    data: DetectionData,
    *,
    batch_size: int = 16,
    workers: int = 0,
    metrics: tuple[str, ...] = (),
) -> Bench:
    """What `model` is measured on. Raises DataError where it lacks a class of `data`."""
    index = known_classes(model, data)
    images = ImageSet(data, model.detector.processor, index, augment=None, seed=0)
    return Bench(
        data=data, images=images, class_index=index, batch_size=batch_size, workers=workers, metrics=metrics
    )


# --- the steps of the stories above ---


def _check_metrics(names: Sequence[str]) -> None:
    for name in names:
        plugins.get("metric", name)


def _runnable(source: Source, threads: int | None, listener: Listener) -> Model:
    """The model of a folder, or an exported file as one, to run on `threads` cores."""
    if not is_exported(source.model):
        if threads is not None:
            torch.set_num_threads(threads)
        return open_model(source, listener.say)
    if source.original:
        raise CheckpointError(
            f"{source.model}: {', '.join(source.original)} can only be set for an original .pth"
        )
    artefact = open_artefact(Path(source.model), threads)
    if artefact.may_overflow:
        listener.say(
            f"WARNING: {source.model} is not portable, and this processor has no VNNI: sums of its products "
            "may overflow, and boxes be wrong; write it again with `qdetr export --portable`"
        )
    return Model(detector=artefact.detector)


def _device(source: Source, name: str) -> torch.device:
    """Where it runs. Raises RunError for an exported file that is to run elsewhere than on the CPU."""
    if is_exported(source.model) and name not in ("auto", "cpu"):
        raise RunError(f"--device {name}: exported files run on the CPU; leave --device out")
    return torch.device("cpu") if is_exported(source.model) else torch_device(name)


def _nothing_to_switch(source: Source, *, packed: bool) -> str:
    if packed:
        return (
            f"{source.model}: is packed, so its weights are integers and cannot be switched to float; "
            "give --ladder the folder that it was packed from"
        )
    if is_exported(source.model):
        return (
            f"{source.model}: is an exported file, whose quantizers cannot be switched; "
            "give --ladder the folder that it was exported from"
        )
    return (
        f"{source.model}: is a float model, so --ladder has nothing to switch; "
        "run `qdetr quantize` or `qdetr finetune` on it first"
    )


def _predicted(model: Model, path: Path, threshold: float, where: torch.device) -> PredictedImage:
    names = model.detector.class_names
    labels = tuple(sorted(names))
    batch = single_image(path, model.detector.processor).to(where)
    (found,) = detect(model.module, model.family, batch, labels)
    kept = found.scores >= threshold
    return PredictedImage(
        path=path,
        boxes=found.boxes[kept].tolist(),
        scores=found.scores[kept].tolist(),
        classes=[names[labels[label]] for label in found.labels[kept]],
    )
