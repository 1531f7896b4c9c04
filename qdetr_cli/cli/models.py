"""Commands that look into a model and make one: inspect, quantize, finetune."""

from typing import Annotated

import typer

from qdetr_cli.cli.app import app, reported, reported_once
from qdetr_cli.cli.options import (
    Data,
    Device,
    Dilation,
    Heads,
    Images,
    Json,
    MaybeRecipe,
    Model,
    Original,
    Out,
    Plugins,
    PreNorm,
    RecipeName,
    Set,
    Size,
    Split,
    TrainSplit,
)


@app.command()
@reported
def inspect(
    model: Model,
    recipe: MaybeRecipe = None,
    size: Size = None,
    heads: Heads = None,
    dilation: Dilation = None,
    pre_norm: PreNorm = None,
    original: Original = None,
    plugins: Plugins = None,
    set_: Set = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """What is in a model, and what a recipe would do to it."""
    from qdetr_cli import models, pipeline, report

    page = report.Page(json=json)
    options = models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm)
    found = pipeline.inspect(
        options,
        recipe=recipe,
        overrides=set_ or (),
        size=size,
        plugins=plugins or (),
        device=device,
        listener=page,
    )
    page.inspection(found)


@app.command()
@reported_once
def quantize(
    model: Model,
    recipe: RecipeName,
    data: Data,
    out: Out,
    images: Images = None,
    train_split: TrainSplit = "train",
    split: Split = "val",
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="AP before and after, on --split.")
    ] = True,
    heads: Heads = None,
    dilation: Dilation = None,
    pre_norm: PreNorm = None,
    original: Original = None,
    plugins: Plugins = None,
    set_: Set = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Calibrate: write a fake-quant checkpoint, and tell what it lost."""
    from qdetr_cli import models, pipeline, report, results

    page = report.Page(json=json)
    result = pipeline.quantize(
        models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm),
        recipe=recipe,
        overrides=set_ or (),
        data=results.DataSource(data, images=images, train=train_split, split=split),
        out=out,
        measured=measure,
        plugins=plugins or (),
        device=device,
        listener=page,
    )
    page.quantized(result)


@app.command()
@reported_once
def finetune(
    model: Model,
    recipe: RecipeName,
    data: Data,
    out: Out,
    images: Images = None,
    train_split: TrainSplit = "train",
    split: Split = "val",
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="A float teacher, over the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard too.")] = False,
    heads: Heads = None,
    dilation: Dilation = None,
    pre_norm: PreNorm = None,
    original: Original = None,
    plugins: Plugins = None,
    set_: Set = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Fine-tune under quantization (or in float, with a recipe that quantizes nothing)."""
    from qdetr_cli import models, pipeline, report, results

    page = report.Page(json=json, tensorboard=out / "tensorboard" if tensorboard else None)
    result = pipeline.finetune(
        models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm),
        recipe=recipe,
        overrides=set_ or (),
        data=results.DataSource(data, images=images, train=train_split, split=split),
        out=out,
        teacher=teacher,
        resume=resume,
        plugins=plugins or (),
        device=device,
        listener=page,
    )
    page.finetuned(result)
