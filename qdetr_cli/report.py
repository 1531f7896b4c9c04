"""Results for people (tables, plots, drawn images) and for programs (JSON). The only module that prints."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from qdetr_cli.documents import (
    benchmark_dict,
    coco_results,
    demo_dict,
    evaluation_dict,
    export_dict,
    inspection_dict,
    prediction_dict,
)
from qdetr_cli.errors import RunError
from qdetr_cli.launch import is_first
from qdetr_cli.runs import write_json
from qdetr_cli.tables import (
    benchmark_lines,
    benchmark_table,
    class_table,
    comparison_table,
    cost_table,
    file_lines,
    float_lines,
    kernel_table,
    ladder_table,
    layer_lines,
    parity_lines,
    plan_lines,
    points,
    role_table,
    storage_table,
)

if TYPE_CHECKING:  # `qdetr recipe list` answers without torch
    from qdetr_cli.demo import Demo
    from qdetr_cli.evaluate import Rung
    from qdetr_cli.metrics import Metrics
    from qdetr_cli.plugins import Entry
    from qdetr_cli.recipe import Recipe
    from qdetr_cli.results import (
        Benchmarked,
        Evaluated,
        Exported,
        Finetuned,
        Inspection,
        PredictedImage,
        Quantized,
    )

SHOWN_TERMS = 6  # loss terms beside the progress bar


class Page:
    """Where one command shows its result: a console; with `json` one object on stdout, the rest on stderr.

    Of several processes the first shows and writes it.
    """

    def __init__(self, *, json: bool = False, tensorboard: Path | None = None) -> None:
        self.json = json
        self.silent = not is_first()
        self.console = Console(stderr=json, soft_wrap=False, emoji=False, quiet=self.silent)
        self._progress: Progress | None = None
        self._task: Any = None
        self._new_writer = _tensorboard(None if self.silent else tensorboard)
        self._writer: Any = None

    # --- while it happens (pipeline.Listener) ---

    def say(self, text: str) -> None:
        """One line that the user should know."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that counts images."""
        with _bar(self.console) as bar:
            task = bar.add_task(what, total=total, terms="")
            yield lambda done: bar.update(task, advance=done)

    @contextmanager
    def training(self) -> Iterator[None]:
        """A bar that follows the steps of a training, with its loss terms."""
        self._writer = self._new_writer()
        with _bar(self.console) as bar:
            self._progress, self._task = bar, bar.add_task("fine-tune", total=None, terms="")
            try:
                yield
            finally:
                self._progress = None
                if self._writer is not None:
                    self._writer.close()

    def stepped(self, step: int, total: int, entry: Mapping[str, float]) -> None:
        """Move the training's bar and write the terms to TensorBoard."""
        if self._progress is not None:
            shown = list(entry.items())[:SHOWN_TERMS]
            terms = "  ".join(f"{name} {value:.3f}" for name, value in shown)
            self._progress.update(self._task, completed=step, total=total, terms=terms)
        if self._writer is not None:
            for name, value in entry.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    def evaluated(self, step: int, total: int, metrics: Metrics) -> None:
        """One line for each evaluation on the way."""
        self.say(
            f"step {step}/{total}: AP {points(metrics.ap)}  AP50(voc-area) {points(metrics.ap50_voc_area)}"
        )
        if self._writer is not None:
            self._writer.add_scalar("eval/ap", metrics.ap, step)
            self._writer.add_scalar("eval/ap50_voc_area", metrics.ap50_voc_area, step)

    # --- results ---

    def inspection(self, found: Inspection) -> None:
        """What `qdetr inspect` found: the model, and the plan if there is one."""
        if self.json:
            return self._object(inspection_dict(found))
        self.console.print(role_table(found))
        names = list(found.detector.class_names.values())
        self.say(f"{len(names)} classes: {', '.join(names[:12])}")
        if found.storage is not None:
            self.console.print(storage_table(found.storage))
        if found.plan is None:
            self._lines(layer_lines(found))
            return None
        self.say("plan: module, role, bits of each slot, and the rule that decided or why it stays float")
        self._lines(plan_lines(found.plan))
        self.console.print(cost_table(found.plan, found.parameters))
        return None

    def quantized(self, result: Quantized) -> None:
        """AP before and after calibration."""
        rows = {"float": result.before, "calibrated": result.after}
        measured = {name: metrics for name, metrics in rows.items() if metrics is not None}
        if self.json:
            body = {name: metrics.to_dict() for name, metrics in measured.items()}
            return self._object({"folder": str(result.folder), "totals": result.plan.totals(), **body})
        if measured:
            self.console.print(comparison_table(measured))
        self.console.print(cost_table(result.plan))
        self.say(f"{result.folder}: written")
        return None

    def finetuned(self, result: Finetuned) -> None:
        """How a training ended."""
        fit = result.fit
        if self.json:
            body = {"best_ap": fit.best_ap, "best_step": fit.best_step, "steps": fit.steps}
            return self._object(
                {"folder": str(result.folder), **body, "seconds": fit.seconds, "last": fit.last.to_dict()}
            )
        self.console.print(comparison_table({"last": fit.last}))
        self.say(
            f"best AP {points(fit.best_ap)} at step {fit.best_step}; {fit.steps} steps, {fit.seconds:.0f} s"
        )
        self.say(f"{result.folder}: best/ and last/ written")
        return None

    def evaluated_model(self, result: Evaluated, out: Path | None) -> None:
        """AP, AP per class, ladder; with `out` also metrics.json, detections.json and ladder.png there."""
        from qdetr_cli.plots import plot_ladder

        body = evaluation_dict(result)
        if out is not None and not self.silent:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "metrics.json", body)
            write_json(out / "detections.json", coco_results(result))
            if result.ladder:
                plot_ladder(result.ladder, out / "ladder.png")
        if self.json:
            return self._object(body)
        self._warnings(result.warnings)
        self.console.print(comparison_table({f"{result.split} ({result.images} images)": result.metrics}))
        self.console.print(class_table(result.metrics))
        for name, numbers in result.metrics.to_dict()["plugins"].items():
            self.say(f"{name}: {', '.join(f'{key} {value}' for key, value in numbers.items())}")
        if result.ladder:
            self._ladder(result.ladder)
        if out is not None:
            self.say(f"{out}: written")
        return None

    def predictions(self, found: Sequence[PredictedImage], out: Path) -> None:
        """Images with boxes and predictions.json in `out`."""
        from qdetr_cli.plots import draw_boxes

        out.mkdir(parents=True, exist_ok=True)
        body = [prediction_dict(each) for each in found]
        names = draw_boxes(found, out)
        write_json(out / "predictions.json", body)
        if self.json:
            return self._object({"images": body})
        for name, each in zip(names, found, strict=True):
            self.say(f"{name}: {len(each.boxes)} objects")
        return None

    def exported(self, result: Exported) -> None:
        """What `qdetr export` wrote, what of it runs on integers, and how it compares with the model."""
        if self.json:
            return self._object(export_dict(result))
        if result.kernels is not None:
            self.console.print(kernel_table(result.kernels))
            self._lines(float_lines(result.floats))
        if result.parity is not None:
            self._lines(parity_lines(result.parity))
        if result.metrics:
            self.console.print(comparison_table(result.metrics))
        self._lines(file_lines(result))
        return None

    def benchmarked(self, result: Benchmarked) -> None:
        """Candidates side by side."""
        if self.json:
            return self._object(benchmark_dict(result))
        self.console.print(benchmark_table(result))
        self._lines(benchmark_lines(result))
        return None

    def plugin_table(self, entries: Sequence[Entry], families: Sequence[Mapping[str, str]]) -> None:
        """What is registered, by kind, and what is supported of each family."""
        if self.json:
            rows = [{"kind": e.kind, "name": e.name, "origin": e.origin} for e in entries]
            return self._object({"plugins": rows, "families": list(families)})
        table = Table("kind", "name", "from")
        for entry in entries:
            table.add_row(entry.kind, entry.name, escape(entry.origin))
        self.console.print(table)
        supported = Table(*families[0])
        for family in families:
            supported.add_row(*family.values())
        self.console.print(supported)
        return None

    def recipe_table(self, summaries: Mapping[str, str]) -> None:
        """The shipped recipes."""
        if self.json:
            return self._object({"recipes": dict(summaries)})
        table = Table("recipe", "for")
        for name, summary in summaries.items():
            table.add_row(name, escape(summary))
        self.console.print(table)
        return None

    def recipe(self, recipe: Recipe) -> None:
        """A recipe with everything that it extends."""
        if self.json:
            return self._object(recipe.to_dict())
        self.console.print_json(data=recipe.to_dict())
        self.say("no faults in the recipe itself; `qdetr inspect MODEL --recipe` checks it against a model")
        return None

    def demo(self, result: Demo) -> None:
        """The demo's tables, plots and images; `results.json` holds it all."""
        from qdetr_cli.plots import draw_boxes, plot_bars, plot_ladder

        body = demo_dict(result)
        write_json(result.out / "results.json", body)
        plot_ladder(result.ladder, result.out / "ladder.png")
        rows = {"float": result.before, "PTQ": result.calibrated, "QAT": result.finetuned}
        plot_bars(
            {name: metrics.ap50_voc_area for name, metrics in rows.items()},
            result.out / "comparison.png",
            title=f"{result.model}, {result.recipe}",
        )
        images = result.out / "images"
        images.mkdir()
        draw_boxes(result.predictions, images)
        if self.json:
            return self._object(body)
        self.console.print(comparison_table(rows))
        self._ladder(result.ladder)
        self.say(f"{result.seconds:.0f} s; everything lies in {result.out}: results.json, comparison.png,")
        self.say("ladder.png, images/ (boxes), ptq/ and qat/ (checkpoints), scenes/ (data as VOC and COCO)")
        return None

    # --- parts ---

    def _object(self, body: Mapping[str, Any]) -> None:
        if not self.silent:
            sys.stdout.write(json_module.dumps(body, indent=2, allow_nan=False) + "\n")

    def _lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.say(line)

    def _ladder(self, rungs: Sequence[Rung]) -> None:
        self.console.print(ladder_table(rungs))
        self.say("delta: points of AP50(voc-area) against the same weights with every quantizer off")

    def _warnings(self, warnings: Mapping[str, int]) -> None:
        for what, count in warnings.items():
            self.say(f"warning: {what}: {count}")


def _bar(console: Console) -> Progress:
    """A bar whose loss terms, the last column, take what the others leave of the line."""
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}", table_column=rest),
        console=console,
        expand=True,
    )


def _tensorboard(folder: Path | None) -> Callable[[], Any]:
    """What makes the TensorBoard writer, or None, once the run folder is there; the package is needed now."""
    if folder is None:
        return lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError('--tensorboard needs TensorBoard: pip install "qdetr[tensorboard]"') from error
    return lambda: SummaryWriter(str(folder))
