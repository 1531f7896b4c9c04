"""Results for people (tables, plots, drawn images) and for programs (JSON). The only module that prints."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from rich.table import Table

from qdetr_cli.documents import (
    coco_results,
    demo_dict,
    evaluation_dict,
    inspection_dict,
    ladder_list,
    prediction_dict,
)
from qdetr_cli.errors import RunError
from qdetr_cli.runs import write_json

if TYPE_CHECKING:  # `qdetr recipe list` answers without torch
    from qdetr_cli.demo import Demo
    from qdetr_cli.evaluate import Rung
    from qdetr_cli.metrics import Metrics
    from qdetr_cli.plan import Plan
    from qdetr_cli.plugins import Entry
    from qdetr_cli.recipe import Recipe
    from qdetr_cli.results import Evaluated, Finetuned, Inspection, PredictedImage, Quantized

HEADLINE = {
    "ap": "AP",
    "ap50": "AP50(coco)",
    "ap75": "AP75",
    "ap50_voc_area": "AP50(voc-area)",
    "ap50_voc07": "AP50(voc07-11pt)",
}
SIZES = {
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar_1": "AR 1",
    "ar_10": "AR 10",
    "ar_100": "AR 100",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}
SHOWN_TERMS = 6  # loss terms beside the progress bar


class Page:
    """Where one command shows its result: a console; with `json` one object on stdout, the rest on stderr."""

    def __init__(self, *, json: bool = False, tensorboard: Path | None = None) -> None:
        self.json = json
        self.console = Console(stderr=json, soft_wrap=False, emoji=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._new_writer = _tensorboard(tensorboard)
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
            f"step {step}/{total}: AP {_points(metrics.ap)}  AP50(voc-area) {_points(metrics.ap50_voc_area)}"
        )
        if self._writer is not None:
            self._writer.add_scalar("eval/ap", metrics.ap, step)
            self._writer.add_scalar("eval/ap50_voc_area", metrics.ap50_voc_area, step)

    # --- results ---

    def inspection(self, found: Inspection) -> None:
        """What `qdetr inspect` found: the model, and the plan if there is one."""
        if self.json:
            return self._object(inspection_dict(found))
        facts, detector = found.facts, found.detector
        height, width = facts.size
        layers = Table(title=f"{detector.family.name} at {height}x{width}", title_justify="left")
        for heading in ("role", "modules", "MACs", "weights"):
            layers.add_column(heading, justify="left" if heading == "role" else "right")
        for role, (count, macs, weights) in _by_role(found).items():
            layers.add_row(role or "(none)", str(count), _count(macs), _count(weights))
        self.console.print(layers)
        self.say(
            f"{len(detector.class_names)} classes: {', '.join(list(detector.class_names.values())[:12])}"
        )
        if found.plan is not None:
            self._plan(found.plan, found.parameters)
            return None
        for layer in facts.layers:
            self.say(f"  {layer.path}  [{layer.role}]  {layer.op}  {_count(layer.macs)} MACs")
        for attention in facts.attentions:
            self.say(f"  {attention.path}  [{attention.role}]  {attention.op}  {_count(attention.macs)} MACs")
        return None

    def quantized(self, result: Quantized) -> None:
        """AP before and after calibration."""
        rows = {"float": result.before, "calibrated": result.after}
        measured = {name: metrics for name, metrics in rows.items() if metrics is not None}
        if self.json:
            body = {name: metrics.to_dict() for name, metrics in measured.items()}
            return self._object({"folder": str(result.folder), "totals": result.plan.totals(), **body})
        if measured:
            self._comparison(measured)
        self._totals(result.plan)
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
        self._comparison({"last": fit.last})
        self.say(
            f"best AP {_points(fit.best_ap)} at step {fit.best_step}; {fit.steps} steps, {fit.seconds:.0f} s"
        )
        self.say(f"{result.folder}: best/ and last/ written")
        return None

    def evaluated_model(self, result: Evaluated, out: Path | None) -> None:
        """AP, AP per class, ladder; with `out` also metrics.json, detections.json and ladder.png there."""
        from qdetr_cli.plots import plot_ladder

        body = evaluation_dict(result)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "metrics.json", body)
            write_json(out / "detections.json", coco_results(result))
            if result.ladder:
                plot_ladder(result.ladder, out / "ladder.png")
        if self.json:
            return self._object(body)
        self._warnings(result.warnings)
        self._comparison({f"{result.split} ({result.images} images)": result.metrics})
        self._per_class(result.metrics)
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
        self._comparison(rows)
        self._ladder(result.ladder)
        self.say(f"{result.seconds:.0f} s; everything lies in {result.out}: results.json, comparison.png,")
        self.say("ladder.png, images/ (boxes), ptq/ and qat/ (checkpoints), scenes/ (data as VOC and COCO)")
        return None

    # --- parts ---

    def _object(self, body: Mapping[str, Any]) -> None:
        sys.stdout.write(json_module.dumps(body, indent=2, allow_nan=False) + "\n")

    def _comparison(self, rows: Mapping[str, Metrics]) -> None:
        table = Table()
        table.add_column("")
        shown = HEADLINE | (SIZES if len(rows) == 1 else {})
        if len(rows) == 1:
            ((name, metrics),) = rows.items()
            table.add_column(name, justify="right")
            for key, heading in shown.items():
                table.add_row(heading, _points(getattr(metrics, key)))
        else:
            for heading in shown.values():
                table.add_column(heading, justify="right")
            for name, metrics in rows.items():
                table.add_row(name, *(_points(getattr(metrics, key)) for key in shown))
        self.console.print(table)

    def _per_class(self, metrics: Metrics) -> None:
        table = Table(
            "class", "objects", "AP", "AP50(coco)", "AP50(voc-area)", title="per class", title_justify="left"
        )
        for name, row in metrics.to_dict()["per_class"].items():
            table.add_row(
                escape(name), str(row["objects"]), *(_points(row[k]) for k in ("ap", "ap50", "ap50_voc_area"))
            )
        self.console.print(table)

    def _ladder(self, rungs: Sequence[Rung]) -> None:
        table = Table(
            "rung",
            "AP",
            "AP50(voc-area)",
            "delta",
            title="ladder: what each module group costs",
            title_justify="left",
        )
        for entry in ladder_list(rungs):
            table.add_row(
                escape(entry["rung"]),
                _points(entry["ap"]),
                _points(entry["ap50_voc_area"]),
                "" if entry["delta"] is None else f"{100 * entry['delta']:+.1f}",
            )
        self.console.print(table)
        self.say("delta: points of AP50(voc-area) against the same weights with every quantizer off")

    def _warnings(self, warnings: Mapping[str, int]) -> None:
        for what, count in warnings.items():
            self.say(f"warning: {what}: {count}")

    def _plan(self, plan: Plan, parameters: int) -> None:
        """One line for each module: path, bits of each slot, and the rule or the reason."""
        self.say("plan: module, role, bits of each slot, and the rule that decided or why it stays float")
        for module in plan.modules:
            bits = " ".join(
                f"{s.slot}={'float' if s.format is None else s.format.bits}" for s in module.slots
            )
            rules = ", ".join(dict.fromkeys(s.rule for s in module.slots if s.rule))
            self.say(f"  {module.path}  [{module.role}]  {bits}  {module.reason or rules}")
        for line in plan.skipped:
            self.say(line)
        self._totals(plan, parameters)

    def _totals(self, plan: Plan, parameters: int = 0) -> None:
        table = Table("per image", "float", "quantized", title="cost", title_justify="left")
        for name, before, after in plan.costs(parameters):
            table.add_row(name, before, after)
        self.console.print(table)


def _by_role(found: Inspection) -> dict[str, tuple[int, int, int]]:
    sums: dict[str, tuple[int, int, int]] = {}
    for layer in found.facts.layers:
        count, macs, weights = sums.get(layer.role, (0, 0, 0))
        sums[layer.role] = (count + 1, macs + layer.macs, weights + layer.weights)
    for attention in found.facts.attentions:
        count, macs, weights = sums.get(attention.role, (0, 0, 0))
        sums[attention.role] = (count + 1, macs + attention.macs, weights)
    return sums


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
        console=console,
    )


def _points(value: float | None) -> str:
    """AP in points with one decimal, and a dash where there is no object to measure on."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def _count(value: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)


def _tensorboard(folder: Path | None) -> Callable[[], Any]:
    """What makes the TensorBoard writer, or None, once the run folder is there; the package is needed now."""
    if folder is None:
        return lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError('--tensorboard needs TensorBoard: pip install "qdetr[tensorboard]"') from error
    return lambda: SummaryWriter(str(folder))
