"""The story: load, plan, rewrite, calibrate, fit, evaluate. Each command is one function here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qdetr_cli import plugins
from qdetr_cli.artefact import open_artefact
from qdetr_cli.data import DetectionData, ImageSet, check_images, image_files, open_data, single_image
from qdetr_cli.errors import CheckpointError, RecipeError, RunError
from qdetr_cli.evaluate import Bench, Rung, detect, detect_all
from qdetr_cli.evaluate import evaluate as evaluate_model
from qdetr_cli.evaluate import ladder as climb
from qdetr_cli.losses import check_trainable
from qdetr_cli.metrics import Metrics, measure
from qdetr_cli.models import (
    Model,
    Source,
    checkpoint_folder,
    fitted_to,
    known_classes,
    must_be_float,
    must_learn,
    open_model,
    parse_size,
    quantized,
    save_model,
    torch_device,
    trace_size,
)
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import Recipe, load_recipe
from qdetr_cli.results import (
    DataSource,
    Evaluated,
    Finetuned,
    Inspection,
    Listener,
    PredictedImage,
    Quantized,
)
from qdetr_cli.runs import begin_run, check_free, check_new, resumes
from qdetr_cli.sessions import is_exported
from qdetr_cli.storage import storage_of
from qdetr_cli.student import calibrated, saver, teacher_of, training_images, under_recipe
from qdetr_cli.terms import check_terms
from qdetr_cli.trace import GraphFacts, trace
from qdetr_cli.train import Trainer


def inspect(
    source: Source,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    size: str | None = None,
    plugins: Sequence[Path] = (),
    device: str = "auto",
    listener: Listener,
) -> Inspection:
    """What is in a model, and what a recipe would do to it."""
    if recipe is None and overrides:
        raise RecipeError(f"--set {overrides[0]}: changes a recipe, and none is given; add --recipe")
    load_plugins(plugins)
    chosen = None if recipe is None else _recipe(recipe, overrides, plugins)
    wanted, where = parse_size(size), torch_device(device)
    model = open_model(source, listener.say)
    model.module.to(where)
    folder = checkpoint_folder(Path(source.model))
    storage = None if folder is None else storage_of(folder)
    if chosen is None and model.facts is not None:
        return replace(_fake_quant_inspection(model, model.facts, source, wanted), storage=storage)
    must_be_float(model, source)
    facts = trace(model.module, model.family, trace_size(model, wanted))
    plan = None if chosen is None else make_plan(chosen, facts)
    return Inspection(detector=model.detector, facts=facts, plan=plan, recipe=chosen, storage=storage)


def quantize(
    source: Source,
    *,
    recipe: str,
    data: DataSource,
    out: Path,
    overrides: Sequence[str] = (),
    measured: bool = True,
    plugins: Sequence[Path] = (),
    device: str = "auto",
    listener: Listener,
) -> Quantized:
    """Calibrate a float model under a recipe and write the fake-quant checkpoint."""
    chosen, where = _recipe(recipe, overrides, plugins), torch_device(device)
    if not chosen.rules:
        raise RecipeError(
            f"{recipe}: quantizes nothing, so there is nothing to calibrate; choose another recipe"
        )
    check_new(out)
    training = open_split(data, data.train, listener)
    evaluation = _measured_on(data, training, listener) if measured else None
    model = open_model(source, listener.say)
    must_be_float(model, source)
    model = fitted_to(model, training, listener.say)
    model.module.to(where)
    before = None if evaluation is None else _ap(model, evaluation, where, "float", listener)
    model = quantized(model, chosen, trace_size(model), listener.say)
    silent = calibrated(model, training, where, listener)
    after = None if evaluation is None else _ap(model, evaluation, where, "calibrated", listener)
    save_model(model.module, model, out, chosen, after)
    assert model.plan is not None
    return Quantized(folder=out, plan=model.plan, silent=silent, before=before, after=after)


def finetune(
    source: Source,
    *,
    recipe: str,
    data: DataSource,
    out: Path,
    overrides: Sequence[str] = (),
    teacher: str | None = None,
    resume: bool = False,
    plugins: Sequence[Path] = (),
    device: str = "auto",
    listener: Listener,
) -> Finetuned:
    """Fine-tune under a recipe with the Hungarian loss; `out` gets `last/`, `best/` and `metrics.jsonl`."""
    extra = [] if teacher is None else [f"distill.teacher={teacher}"]
    chosen, where = _recipe(recipe, [*overrides, *extra], plugins), torch_device(device)
    settings = _settings(source, chosen, data)
    if resume and not resumes(out, settings):
        listener.say(f"{out}: was stopped before its first checkpoint, so it begins again")
        resume = False
    elif not resume:
        check_free(out)
    training = open_split(data, data.train, listener)
    evaluation = _measured_on(data, training, listener)
    opened = open_model(source, listener.say)
    must_learn(opened, source)
    check_trainable(opened.family)
    model = fitted_to(opened, training, listener.say)
    known_classes(model, evaluation)
    mentor = teacher_of(chosen, model, listener, new_head=model is not opened)
    model.module.to(where)
    model = under_recipe(chosen, model, source, training, where, listener, resume=resume)
    trainer = Trainer(
        model.module,
        model.family,
        train=chosen.train,
        distill=chosen.distill,
        images=training_images(model, training, chosen),
        folder=out,
        save=saver(model, chosen),
        evaluate=lambda module: _ap(model, evaluation, where, "evaluate", listener, quiet=True),
        plan=model.plan,
        teacher=mentor,
        same_origin=chosen.distill.teacher == "float",
        device=str(where),
        watch=listener,
    )
    if not resume:
        begin_run(out, settings)
    with listener.training():
        fit = trainer.fit(resume=resume)
    return Finetuned(folder=out, plan=model.plan, fit=fit)


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
        check_new(out)
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
        metrics=measure(evaluation, found, metrics),
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


def load_plugins(folders: Sequence[Path]) -> None:
    """Import the plugins of these folders."""
    plugins.load(folders)


def plugin_entries(folders: Sequence[Path]) -> tuple[plugins.Entry, ...]:
    """Everything that is registered, built-in modules and the named folders included."""
    load_plugins(folders)
    return plugins.entries()


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


def _recipe(name: str, overrides: Sequence[str], folders: Sequence[Path]) -> Recipe:
    """The recipe with its plugins and those of the flag loaded; a checkpoint remembers where both lie."""
    chosen = load_recipe(name, overrides)
    named = [*folders, *(Path(each) for each in chosen.plugins)]
    load_plugins(named)
    check_terms(chosen.distill.terms, "distill.terms")
    check_terms(chosen.train.terms, "train.terms")
    if chosen.rules and chosen.train.batch_norm == "train":
        raise RecipeError(
            f"{name}: train.batch_norm: train has no effect under quantization, where batch norms are "
            "folded; remove it"
        )
    return chosen.model_copy(update={"plugins": tuple(dict.fromkeys(str(each.resolve()) for each in named))})


def _fake_quant_inspection(
    model: Model, facts: GraphFacts, source: Source, wanted: tuple[int, int] | None
) -> Inspection:
    """What a fake-quant checkpoint says of itself; its plan holds the size that it was made at."""
    if wanted not in (None, facts.size):
        raise RunError(
            f"--size: {source.model} is a fake-quant checkpoint, planned at {facts.size[0]}x{facts.size[1]}; "
            "inspect the float checkpoint at another size"
        )
    return Inspection(detector=model.detector, facts=facts, plan=model.plan, recipe=model.recipe)


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
    return Model(detector=open_artefact(Path(source.model), threads).detector)


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


def open_split(data: DataSource, split: str, listener: Listener) -> DetectionData:
    """A split that is ready to be read. A split that ends in .json is a COCO file of its own."""
    path = Path(split) if split.endswith(".json") else data.path
    opened = open_data(path, split=split, images=data.images)
    check_images(opened)
    listener.say(
        f"{path}: {opened.kind.upper()}, split {opened.split}, {len(opened.records)} images, "
        f"{len(opened.class_names)} classes"
    )
    for what, count in opened.warnings.items():
        listener.say(f"warning: {opened.split}: {what}: {count}")
    return opened


def _measured_on(data: DataSource, training: DetectionData, listener: Listener) -> DetectionData:
    """The split to measure on; images that are trained on too are said, for the AP is then too high."""
    evaluation = open_split(data, data.split, listener)
    seen = {record.image.resolve() for record in training.records}
    shared = sum(record.image.resolve() in seen for record in evaluation.records)
    if shared:
        listener.say(
            f"warning: {shared} of {len(evaluation.records)} images to measure on are in the training split "
            "too: the AP says little about new images; name another --split"
        )
    return evaluation


def _ap(
    model: Model,
    data: DetectionData,
    where: torch.device,
    what: str,
    listener: Listener,
    *,
    quiet: bool = False,
) -> Metrics:
    bench = bench_of(model, data)
    if quiet:
        return evaluate_model(model.module, model.family, bench, device=where)
    with listener.progress(what, len(bench.images)) as advance:
        return evaluate_model(model.module, model.family, bench, device=where, advance=advance)


def _settings(source: Source, chosen: Recipe, data: DataSource) -> dict[str, Any]:
    """What `run.json` holds, and what a resumed run must agree with."""
    return {
        "model": source.model,
        "original": dict(source.original),
        "data": str(data.path),
        "images": None if data.images is None else str(data.images),
        "train_split": data.train,
        "split": data.split,
        "recipe": chosen.to_dict(),
    }


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
