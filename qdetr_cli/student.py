"""The student: a model put under a recipe and calibrated, its teacher, its images, and how it is saved."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qdetr_cli.batchnorm import freeze_batch_norms, thaw_batch_norms
from qdetr_cli.calibrate import calibrate, passes
from qdetr_cli.checkpoint import Detector
from qdetr_cli.data import DetectionData, ImageSet
from qdetr_cli.errors import RunError
from qdetr_cli.fold import fold_batch_norms
from qdetr_cli.metrics import Metrics
from qdetr_cli.models import (
    Model,
    Source,
    check_scales,
    known_classes,
    must_be_float,
    open_model,
    quantized,
    save_model,
    trace_size,
)
from qdetr_cli.plan import Plan, make_plan
from qdetr_cli.processes import from_first, make_alike
from qdetr_cli.recipe import QuantFormat, Recipe
from qdetr_cli.results import Listener
from qdetr_cli.trace import GraphFacts, trace


def under_recipe(
    chosen: Recipe,
    model: Model,
    source: Source,
    data: DetectionData,
    where: torch.device,
    listener: Listener,
    *,
    resume: bool,
) -> Model:
    """The model that is trained: under the rules and calibrated, or float with live or frozen batch norms."""
    if model.plan is not None:
        return _continued(chosen, model, source)
    if not chosen.rules:
        if chosen.train.batch_norm == "train":
            thaw_batch_norms(model.module, model.family)
        return model
    model = quantized(model, chosen, trace_size(model), listener.say)
    if not resume:
        calibrated(model, data, where, listener)
    return model


def _continued(chosen: Recipe, model: Model, source: Source) -> Model:
    """A fake-quant checkpoint trained on: its plan stands, so the recipe must give the same one."""
    assert model.facts is not None
    assert model.plan is not None
    if not chosen.rules:
        raise RunError(f"{source.model}: is a fake-quant checkpoint, and this recipe quantizes nothing")
    plan = make_plan(chosen, model.facts)
    if _formats(plan) != _formats(model.plan):
        raise RunError(
            f"{source.model}: was quantized under another plan than this recipe gives; use the recipe it was "
            "quantized with, or start from the float checkpoint"
        )
    return replace(model, plan=plan, recipe=chosen)


def _formats(plan: Plan) -> dict[tuple[str, str], QuantFormat]:
    """(module path, slot) -> format of all that a plan quantizes."""
    return {
        (module.path, slot.slot): slot.format
        for module in plan.modules
        for slot in module.slots
        if slot.format is not None
    }


def teacher_of(chosen: Recipe, model: Model, listener: Listener, *, new_head: bool) -> Model | None:
    """The float teacher that the recipe asks for: a copy of the model, or another checkpoint.

    A model whose class head is new knows nothing to teach: then there is no teacher, and that is said.
    """
    if not chosen.distill.terms:
        return None
    if chosen.distill.teacher is None:
        listener.say(
            f"warning: no teacher, so distill.terms ({', '.join(chosen.distill.terms)}) have no effect; set "
            "distill.teacher: float or give --teacher"
        )
        return None
    if chosen.distill.teacher != "float":
        source = Source(chosen.distill.teacher)
        teacher = open_model(source, listener.say)
        must_be_float(teacher, source)
        _check_teacher(model.detector, teacher.detector)
        return teacher
    if model.plan is not None:
        raise RunError("distill.teacher: float needs a float MODEL; name the float checkpoint with --teacher")
    if new_head:
        listener.say(
            "warning: no teacher, because its class head would be new too; better fine-tune in float on this "
            "data first (--recipe float), then under this recipe"
        )
        return None
    return replace(model, detector=replace(model.detector, model=copy.deepcopy(model.module)))


def quick(teacher: Model, facts: GraphFacts | None) -> nn.Module:
    """The teacher's module, in place: batch norms folded, channels last. It takes a third less time so.

    `facts`: of its graph, where they are known.
    """
    facts = facts or trace(teacher.module, teacher.family, trace_size(teacher))
    fold_batch_norms(teacher.module, facts.batch_norms)
    return teacher.module.to(memory_format=torch.channels_last)


def _check_teacher(student: Detector, teacher: Detector) -> None:
    """Raise RunError for a teacher that cannot be compared: other classes, pixels, or too few queries."""
    if student.family.softmax != teacher.family.softmax or student.class_names != teacher.class_names:
        raise RunError(
            f"--teacher {teacher.source}: has other classes than the student; "
            "fine-tune it in float on this data first"
        )
    mine, theirs = student.processor, teacher.processor
    if (mine.mean, mine.std, mine.rescale) != (theirs.mean, theirs.std, theirs.rescale):
        raise RunError(f"--teacher {teacher.source}: normalises pixels in another way than the student")
    queries, taught = (each.family.query_count(each.model.config) for each in (student, teacher))
    if taught < queries:
        raise RunError(
            f"--teacher {teacher.source}: has {taught} queries, fewer than the student's {queries}"
        )


def training_images(model: Model, data: DetectionData, chosen: Recipe) -> ImageSet:
    check_scales(model, chosen.train.augment.scales)
    return ImageSet(
        data,
        model.detector.processor,
        known_classes(model, data),
        augment=chosen.train.augment,
        seed=chosen.train.seed,
    )


def saver(model: Model, chosen: Recipe) -> Callable[[nn.Module, Path, Metrics | None], None]:
    """Writes the trained module as a checkpoint; live batch norms are written frozen."""

    def save(module: nn.Module, folder: Path, metrics: Metrics | None) -> None:
        thawed = model.plan is None and chosen.train.batch_norm == "train"
        written = freeze_batch_norms(copy.deepcopy(module), model.family) if thawed else module
        save_model(written, model, folder, chosen, metrics)

    return save


def calibrated(model: Model, data: DetectionData, where: torch.device, listener: Listener) -> tuple[str, ...]:
    """Calibrate in place; the quantizers that saw nothing are said and given back.

    Of several processes the first calibrates, and the others get what it found.
    """
    assert model.recipe is not None
    spec = model.recipe.calibrate
    images = ImageSet(
        data, model.detector.processor, known_classes(model, data), augment=None, seed=spec.seed
    )
    with listener.progress("calibrate", passes(model.module) * min(spec.images, len(images))) as advance:
        silent = from_first(lambda: calibrate(model.module, images, spec, device=where, advance=advance))
    make_alike(model.module)
    for path in silent:
        kept = "stays off" if path.endswith(("_alignment", ".balance")) else "keeps the smallest step"
        listener.say(f"warning: {path} saw no value in calibration and {kept}")
    return silent
