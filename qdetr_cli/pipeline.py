"""The story: load, plan, rewrite, calibrate, fit. Each command that makes a model is one function here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qdetr_cli import plugins
from qdetr_cli.data import DetectionData
from qdetr_cli.devices import torch_device
from qdetr_cli.errors import RecipeError, RunError
from qdetr_cli.evaluate import evaluate as evaluate_model
from qdetr_cli.losses import check_trainable
from qdetr_cli.metrics import Metrics
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
    trace_size,
)
from qdetr_cli.plan import make_plan
from qdetr_cli.plugins import load as load_plugins
from qdetr_cli.processes import from_first, jointly, make_alike, world
from qdetr_cli.recipe import Recipe, load_recipe
from qdetr_cli.results import DataSource, Finetuned, Inspection, Listener, Quantized
from qdetr_cli.running import bench_of
from qdetr_cli.runs import begin_run, check_free, check_new, resumes
from qdetr_cli.splits import measured_on, open_split
from qdetr_cli.storage import storage_of
from qdetr_cli.student import calibrated, quick, saver, teacher_of, training_images, under_recipe
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


@jointly
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
    from_first(lambda: check_new(out))
    training = open_split(data, data.train, listener)
    evaluation = measured_on(data, training, listener) if measured else None
    model = open_model(source, listener.say)
    must_be_float(model, source)
    model = fitted_to(model, training, listener.say)
    make_alike(model.module)  # a new class head is drawn
    model.module.to(where)
    before = None if evaluation is None else _ap(model, evaluation, where, "float", listener)
    model = quantized(model, chosen, trace_size(model), listener.say)
    silent = calibrated(model, training, where, listener)
    after = None if evaluation is None else _ap(model, evaluation, where, "calibrated", listener)
    plan = model.plan
    assert plan is not None
    from_first(lambda: save_model(model.module, model, out, chosen, after))
    return Quantized(folder=out, plan=plan, silent=silent, before=before, after=after)


@jointly
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
    if resume and not from_first(lambda: resumes(out, settings)):
        listener.say(f"{out}: was stopped before its first checkpoint, so it begins again")
        resume = False
    elif not resume:
        from_first(lambda: check_free(out))
    training = open_split(data, data.train, listener)
    evaluation = measured_on(data, training, listener)
    opened = open_model(source, listener.say)
    must_learn(opened, source)
    check_trainable(opened.family)
    model = fitted_to(opened, training, listener.say)
    known_classes(model, evaluation)
    make_alike(model.module)  # a new class head is drawn
    mentor = teacher_of(chosen, model, listener, new_head=model is not opened)
    model.module.to(where)
    model = under_recipe(chosen, model, source, training, where, listener, resume=resume)
    of_itself = chosen.distill.teacher == "float"
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
        teacher=None if mentor is None else quick(mentor, model.facts if of_itself else None),
        same_origin=of_itself,
        device=str(where),
        watch=listener,
    )
    if not resume:
        from_first(lambda: begin_run(out, settings))
    with listener.training():
        fit = trainer.fit(resume=resume)
    return Finetuned(folder=out, plan=model.plan, fit=fit)


def plugin_entries(folders: Sequence[Path]) -> tuple[plugins.Entry, ...]:
    """Everything that is registered, built-in modules and the named folders included."""
    load_plugins(folders)
    return plugins.entries()


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
    """What `run.json` holds, and what a resumed run must agree with: the images of a step, however shared."""
    return {
        "model": source.model,
        "original": dict(source.original),
        "data": str(data.path),
        "images": None if data.images is None else str(data.images),
        "train_split": data.train,
        "split": data.split,
        "recipe": chosen.to_dict(),
        "images_per_step": chosen.train.batch_size * chosen.train.accumulate * world(),
    }
