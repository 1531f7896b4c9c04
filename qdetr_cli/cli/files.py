"""Commands about files that run: export, benchmark."""

from pathlib import Path
from typing import Annotated

import typer

from qdetr_cli.cli.app import app, reported
from qdetr_cli.cli.options import (
    Dilation,
    Heads,
    Images,
    Json,
    MaybeData,
    Model,
    Original,
    Plugins,
    PreNorm,
    Split,
    Threads,
)


@app.command()
@reported
def export(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", show_default=False, help="A new file: .onnx, or .xml; for packed a new folder."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option("--to", help="onnx, openvino or packed.", show_default="the recipe's, onnx"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HxW",
            help="The size of its images, or any, which DETR's line and YOLOS allow.",
            show_default="the recipe's or plan's",
        ),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Images in one run: a number, or any.")] = "1",
    portable: Annotated[
        bool | None,
        typer.Option(
            "--portable/--no-portable",
            help="Exact on x86 without VNNI too, where sums of 8-bit products overflow.",
            show_default="the recipe's, or what this processor needs",
        ),
    ] = None,
    data: MaybeData = None,
    images: Images = None,
    split: Split = "val",
    threads: Threads = None,
    heads: Heads = None,
    dilation: Dilation = None,
    pre_norm: PreNorm = None,
    original: Original = None,
    plugins: Plugins = None,
    json: Json = False,
) -> None:
    """Write an integer model that runs, and compare it with the fake-quant model."""
    from qdetr_cli import delivery, models, report, results

    page = report.Page(json=json)
    result = delivery.export(
        models.source_of(model, original or (), heads=heads, dilation=dilation, pre_norm=pre_norm),
        to=to,
        out=out,
        size=size,
        batch=batch,
        portable=portable,
        data=None if data is None else results.DataSource(data, images=images, split=split),
        threads=threads,
        plugins=plugins or (),
        listener=page,
    )
    page.exported(result)


@app.command()
@reported
def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|FILE...", show_default=False, help="Models, and exported .onnx and .xml files."
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="HxW", help="The size of the images.", show_default="the file's"),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Images in one run.")] = None,
    threads: Threads = None,
    runs: Annotated[int, typer.Option("--runs", min=3, help="Counted runs of each, or more, in turns.")] = 30,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help="Where models run: torch, onnxruntime, openvino. Repeatable.",
            show_default="all installed",
        ),
    ] = None,
    plugins: Plugins = None,
    json: Json = False,
) -> None:
    """Latency, throughput, memory and size, beside the float model in torch, ONNX Runtime and OpenVINO."""
    from qdetr_cli import delivery, report
    from qdetr_cli.models import source_of

    page = report.Page(json=json)
    result = delivery.benchmark(
        [source_of(each) for each in models],
        size=size,
        batch=batch,
        threads=threads,
        runs=runs,
        runtimes=runtime or (),
        plugins=plugins or (),
        listener=page,
    )
    page.benchmarked(result)
