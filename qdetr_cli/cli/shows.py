"""Commands that show what qdetr is: demo, plugins."""

from pathlib import Path
from typing import Annotated

import typer

from qdetr_cli.cli.app import app, reported
from qdetr_cli.cli.options import (
    Device,
    Json,
    Plugins,
    Set,
)


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
