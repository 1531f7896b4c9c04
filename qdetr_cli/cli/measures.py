"""Commands that run a model, folder or exported file: eval, predict."""

from pathlib import Path
from typing import Annotated

import typer

from qdetr_cli.cli.app import app, reported, reported_once
from qdetr_cli.cli.options import (
    BatchSize,
    Data,
    Device,
    Dilation,
    Heads,
    Images,
    Json,
    Original,
    Out,
    Plugins,
    PreNorm,
    Runnable,
    Split,
    Threads,
    Workers,
)


@app.command("eval")
@reported_once
def evaluate(
    model: Runnable,
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
    threads: Threads = None,
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
    from qdetr_cli import models, report, results, running

    page = report.Page(json=json)
    result = running.evaluate(
        models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm),
        data=results.DataSource(data, images=images, split=split),
        ladder=ladder,
        batch_size=batch_size,
        workers=workers,
        metrics=tuple(metric or ()),
        out=out,
        threads=threads,
        plugins=plugins or (),
        device=device,
        listener=page,
    )
    page.evaluated_model(result, out)


@app.command()
@reported
def predict(
    model: Runnable,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", show_default=False, help="Images and folders.")
    ],
    out: Out,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, max=1.0, help="Lowest score drawn.")
    ] = 0.5,
    threads: Threads = None,
    heads: Heads = None,
    dilation: Dilation = None,
    pre_norm: PreNorm = None,
    original: Original = None,
    plugins: Plugins = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Boxes drawn on images, and as JSON."""
    from qdetr_cli import models, report, running

    page = report.Page(json=json)
    found = running.predict(
        models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm),
        images,
        threshold=threshold,
        out=out,
        threads=threads,
        plugins=plugins or (),
        device=device,
        listener=page,
    )
    page.predictions(found, out)
