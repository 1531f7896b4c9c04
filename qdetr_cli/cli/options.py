"""The arguments and options that commands share, each written once."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A Hugging Face folder or hub id, an original .pth, or a folder that qdetr wrote.",
    ),
]
Runnable = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|FILE",
        show_default=False,
        help="A model as elsewhere, or an exported .onnx or .xml.",
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
MaybeData = Annotated[
    Path | None,
    typer.Option("--data", "-d", help="A VOC root, a COCO root, or a COCO json: AP is measured on it."),
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
Threads = Annotated[int | None, typer.Option("--threads", min=1, show_default="all", help="Cores to run on.")]
