"""The whole story on an embedded detector and data: float, calibrated, fine-tuned, ladder, images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdetr_cli import pipeline, running
from qdetr_cli.devices import torch_device
from qdetr_cli.errors import RecipeError, RunError
from qdetr_cli.evaluate import Rung
from qdetr_cli.metrics import Metrics
from qdetr_cli.models import Source, versions
from qdetr_cli.recipe import load_recipe
from qdetr_cli.results import DataSource, Listener, PredictedImage
from qdetr_cli.runs import new_folder
from qdetr_cli.scene_files import write_scenes

MODELS = Path(__file__).parent / "demo_assets" / "models"
TRAIN_IMAGES, VAL_IMAGES, SHOWN_IMAGES = 16_000, 500, 8
# What suits a small detector and minutes instead of a large one and hours; --set goes over it.
SETTINGS = (
    "calibrate.images=256",
    "calibrate.batch_size=32",
    "train.steps=500",
    "train.batch_size=32",
    "train.lr=3.0e-4",
    "train.backbone_lr=3.0e-4",
    "train.quantizer_lr=3.0e-3",
    "train.warmup_steps=25",
    "train.ema=0.99",
    "train.eval_every=1000",
    "train.workers=1",
    "train.augment.flip=0",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo found, and where it left things."""

    out: Path
    model: str
    recipe: str
    settings: tuple[str, ...]
    before: Metrics
    calibrated: Metrics
    finetuned: Metrics
    ladder: tuple[Rung, ...]
    predictions: tuple[PredictedImage, ...]
    seconds: float
    versions: dict[str, str]


def run(
    out: Path,
    *,
    model: str,
    recipe: str,
    overrides: Sequence[str] = (),
    device: str = "auto",
    listener: Listener,
) -> Demo:
    """Write the scenes, then quantize, fine-tune, evaluate and predict as a user would."""
    began = time.monotonic()
    source = embedded(model)
    settings = (*SETTINGS, *overrides)
    if not load_recipe(recipe, settings).rules:
        raise RecipeError(f"--recipe {recipe}: quantizes nothing, so there is nothing to show")
    torch_device(device)
    new_folder(out)
    scenes = _scenes(out, listener)
    data = DataSource(scenes / "voc")
    listener.say(f"1. {model} in float, then calibrated under {recipe} (PTQ)")
    ptq = pipeline.quantize(
        source,
        recipe=recipe,
        data=data,
        out=out / "ptq",
        overrides=settings,
        device=device,
        listener=listener,
    )
    listener.say(f"2. fine-tuned under {recipe} (QAT), the float model as teacher")
    pipeline.finetune(
        source,
        recipe=recipe,
        data=data,
        out=out / "qat",
        overrides=settings,
        device=device,
        listener=listener,
    )
    listener.say("3. which module group costs what before fine-tuning, and the fine-tuned model's AP")
    common: dict[str, Any] = {"data": data, "batch_size": 50, "device": device, "listener": listener}
    ladder = running.evaluate(Source(str(out / "ptq")), ladder=True, **common).ladder
    student = Source(str(out / "qat" / "last"))
    qat = running.evaluate(student, **common)
    shown = sorted((scenes / "coco" / "val").iterdir())[:SHOWN_IMAGES]
    predictions = running.predict(student, shown, threshold=0.4, device=device, listener=listener)
    assert ptq.before is not None
    assert ptq.after is not None
    return Demo(
        out=out,
        model=model,
        recipe=recipe,
        settings=settings,
        before=ptq.before,
        calibrated=ptq.after,
        finetuned=qat.metrics,
        ladder=ladder,
        predictions=predictions,
        seconds=time.monotonic() - began,
        versions=versions(),
    )


def embedded(name: str) -> Source:
    """The embedded detector of this name. Raises RunError that lists the ones there are."""
    names = sorted(folder.name for folder in MODELS.iterdir() if folder.is_dir())
    if name not in names:
        raise RunError(f"--model {name}: is not embedded; choose one of {', '.join(names)}")
    return Source(str(MODELS / name))


def _scenes(out: Path, listener: Listener) -> Path:
    scenes = out / "scenes"
    with listener.progress("write digit scenes", TRAIN_IMAGES + VAL_IMAGES) as advance:
        write_scenes(scenes, train=TRAIN_IMAGES, val=VAL_IMAGES, progress=lambda _: advance(1))
    return scenes
