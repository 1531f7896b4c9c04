"""The command line: flags in, one pipeline call, one report call. Heavy imports stay inside the commands."""

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from qdetr_cli import __version__
from qdetr_cli.errors import QDetrError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="qdetr",
    help="Low-bit quantization-aware training for DETR detectors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(no_args_is_help=True, help="Find, read, check and start recipes.")
app.add_typer(recipe_app, name="recipe")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A Hugging Face folder or hub id, an original .pth, or a folder that qdetr wrote.",
    ),
]
RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", show_default=False, help="A recipe file or the name of a shipped recipe."),
]
MaybeRecipe = Annotated[
    str | None, typer.Option("--recipe", "-r", help="A recipe file or the name of a shipped recipe.")
]
Data = Annotated[
    Path, typer.Option("--data", "-d", show_default=False, help="A VOC root, a COCO root, or a COCO json.")
]
Images = Annotated[Path | None, typer.Option("--images", help="The image folder of a COCO json.")]
Out = Annotated[Path, typer.Option("--out", "-o", show_default=False, help="The folder to write; a new one.")]
Split = Annotated[str, typer.Option("--split", help="The split to measure on, or a COCO json.")]
TrainSplit = Annotated[
    str, typer.Option("--train-split", help="The split to calibrate and train on, or a COCO json.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Over the recipe, e.g. train.epochs=3. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Size = Annotated[str | None, typer.Option("--size", metavar="HxW", help="The image size to count at.")]
Heads = Annotated[int | None, typer.Option("--heads", help="Attention heads, for a .pth that does not say.")]
Dilation = Annotated[
    bool | None, typer.Option("--dilation/--no-dilation", help="DC5, for an original .pth that does not say.")
]
PreNorm = Annotated[
    bool | None, typer.Option("--pre-norm/--post-norm", help="For an original .pth that does not say.")
]
Original = Annotated[
    list[str] | None,
    typer.Option(
        "--original", metavar="NAME=VALUE", help="What else an original .pth does not say. Repeatable."
    ),
]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugins", help="A folder of plugin files to load. Repeatable.")
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read images.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """`command`, with a user's mistake as one message and exit code 2; interrupted, 130 (SIGTERM: 143)."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except QDetrError as error:
            _complain(f"error: {error}")
            raise SystemExit(2) from error
        except KeyboardInterrupt as interruption:
            _complain(f"interrupted{f': {interruption}' if str(interruption) else ''}")
            raise SystemExit(128 + getattr(interruption, "number", signal.SIGINT)) from interruption

    return run


def _complain(message: str) -> None:
    sys.stderr.write(message + "\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qdetr {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Low-bit quantization-aware training for DETR detectors."""


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
@reported
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
@reported
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


@app.command("eval")
@reported
def evaluate(
    model: Model,
    data: Data,
    images: Images = None,
    split: Split = "val",
    ladder: Annotated[
        bool, typer.Option("--ladder", help="AP as module groups are quantized one by one.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder for metrics.json and ladder.png.")
    ] = None,
    batch_size: BatchSize = 16,
    workers: Workers = 2,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="A metric plugin. Repeatable.")] = None,
    heads: Heads = None,
    dilation: Dilation = None,
    pre_norm: PreNorm = None,
    original: Original = None,
    plugins: Plugins = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """AP, AP per class, and with --ladder per-module AP deltas."""
    from qdetr_cli import models, pipeline, report, results

    page = report.Page(json=json)
    result = pipeline.evaluate(
        models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm),
        data=results.DataSource(data, images=images, split=split),
        ladder=ladder,
        batch_size=batch_size,
        workers=workers,
        metrics=tuple(metric or ()),
        out=out,
        plugins=plugins or (),
        device=device,
        listener=page,
    )
    page.evaluated_model(result, out)


@app.command()
@reported
def predict(
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", show_default=False, help="Images and folders.")
    ],
    out: Out,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, max=1.0, help="Lowest score drawn.")
    ] = 0.5,
    heads: Heads = None,
    dilation: Dilation = None,
    pre_norm: PreNorm = None,
    original: Original = None,
    plugins: Plugins = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Boxes drawn on images, and as JSON."""
    from qdetr_cli import models, pipeline, report

    page = report.Page(json=json)
    found = pipeline.predict(
        models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm),
        images,
        threshold=threshold,
        out=out,
        plugins=plugins or (),
        device=device,
        listener=page,
    )
    page.predictions(found, out)


@app.command()
@reported
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a new one.")] = Path(
        "qdetr-demo"
    ),
    model: Annotated[
        str, typer.Option("--model", help="d_fine, or conditional_detr (dense attention).")
    ] = "d_fine",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="The recipe to show.")] = "w4a4",
    set_: Set = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """All of it on an embedded model and data: float, calibrated and fine-tuned AP, ladder, plots, images."""
    from qdetr_cli import demo as embedded
    from qdetr_cli import report

    page = report.Page(json=json)
    result = embedded.run(out, model=model, recipe=recipe, overrides=set_ or (), device=device, listener=page)
    page.demo(result)


@app.command("plugins")
@reported
def list_plugins(plugins: Plugins = None, json: Json = False) -> None:
    """What is registered and where it came from, and what is supported of each family."""
    from qdetr_cli import pipeline, report, support

    entries = pipeline.plugin_entries(plugins or ())
    report.Page(json=json).plugin_table(entries, [row.cells() for row in support.supported()])


@recipe_app.command("list")
@reported
def recipe_list(json: Json = False) -> None:
    """The shipped recipes, with the first line of each."""
    from qdetr_cli import recipe, report

    report.Page(json=json).recipe_table({name: recipe.recipe_summary(name) for name in recipe.recipe_names()})


@recipe_app.command("show")
@reported
def recipe_show(name: Annotated[str, typer.Argument(help="A shipped recipe or a file.")]) -> None:
    """A recipe as it is written."""
    from qdetr_cli import recipe

    typer.echo(recipe.recipe_text(name), nl=False)


@recipe_app.command("check")
@reported
def recipe_check(
    file: Annotated[str, typer.Argument(help="A recipe file or a shipped recipe.")],
    set_: Set = None,
    plugins: Plugins = None,
    json: Json = False,
) -> None:
    """Read a recipe, list every fault, and print it with everything that it extends."""
    from qdetr_cli import plugins as registry
    from qdetr_cli import recipe, report

    read = recipe.load_recipe(file, set_ or ())
    registry.load([*(plugins or ()), *map(Path, read.plugins)])
    report.Page(json=json).recipe(read)


@recipe_app.command("new")
@reported
def recipe_new(
    file: Annotated[Path, typer.Argument(help="The file to write; a new one.")],
    base: Annotated[str, typer.Option("--from", help="The recipe that it extends.")] = "w4a4",
) -> None:
    """Write a commented recipe to start from."""
    from qdetr_cli import recipe

    recipe.new_recipe(file, base)
    typer.echo(f"{file}: written; check it with `qdetr recipe check {file}`")


def main() -> None:
    """The console script."""
    app()
