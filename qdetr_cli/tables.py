"""Results as tables for people. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from qdetr_cli.documents import ladder_list
from qdetr_cli.sessions import TITLES

if TYPE_CHECKING:  # `qdetr recipe list` answers without torch
    from qdetr_cli.benchmark.turns import Timing
    from qdetr_cli.evaluate import Rung
    from qdetr_cli.export.floats import FloatOperation
    from qdetr_cli.export.kernels import Kernels
    from qdetr_cli.export.parity import Parity
    from qdetr_cli.metrics import Metrics
    from qdetr_cli.plan import Plan
    from qdetr_cli.results import Benchmarked, Exported, Inspection
    from qdetr_cli.storage import Storage

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


def role_table(found: Inspection) -> Table:
    """Modules, MACs and weights of each role."""
    height, width = found.facts.size
    table = Table(title=f"{found.detector.family.name} at {height}x{width}", title_justify="left")
    for heading in ("role", "modules", "MACs", "weights"):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for role, (number, macs, weights) in _by_role(found).items():
        table.add_row(role or "(none)", str(number), count(macs), count(weights))
    return table


def storage_table(storage: Storage) -> Table:
    """Tensors, values and bytes by the bits in which they are stored, and what float32 would take."""
    times = f"{storage.float_bytes / max(storage.bytes, 1):.2f} times as much in float32"
    table = Table(title=f"stored: {storage.bytes / 1e6:.2f} MB, {times}", title_justify="left")
    for heading in ("as", "tensors", "values", "MB"):
        table.add_column(heading, justify="left" if heading == "as" else "right")
    for row in storage.rows:
        table.add_row(row.kind, str(row.tensors), count(row.values), f"{row.bytes / 1e6:.2f}")
    return table


def layer_lines(found: Inspection) -> Iterator[str]:
    """One line for each layer and attention."""
    for layer in found.facts.layers:
        yield f"  {layer.path}  [{layer.role}]  {layer.op}  {count(layer.macs)} MACs"
    for attention in found.facts.attentions:
        yield f"  {attention.path}  [{attention.role}]  {attention.op}  {count(attention.macs)} MACs"


def comparison_table(rows: Mapping[str, Metrics]) -> Table:
    """AP of each row; of a single one the numbers by size and by detections too, one below the other."""
    table = Table()
    table.add_column("")
    if len(rows) == 1:
        ((name, metrics),) = rows.items()
        table.add_column(name, justify="right")
        for key, heading in (HEADLINE | SIZES).items():
            table.add_row(heading, points(getattr(metrics, key)))
        return table
    for heading in HEADLINE.values():
        table.add_column(heading, justify="right")
    for name, metrics in rows.items():
        table.add_row(name, *(points(getattr(metrics, key)) for key in HEADLINE))
    return table


def class_table(metrics: Metrics) -> Table:
    """Objects and AP of each class."""
    table = Table(
        "class", "objects", "AP", "AP50(coco)", "AP50(voc-area)", title="per class", title_justify="left"
    )
    for name, row in metrics.to_dict()["per_class"].items():
        numbers = (points(row[key]) for key in ("ap", "ap50", "ap50_voc_area"))
        table.add_row(escape(name), str(row["objects"]), *numbers)
    return table


def ladder_table(rungs: Sequence[Rung]) -> Table:
    """AP of each rung, and its delta in points."""
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
            points(entry["ap"]),
            points(entry["ap50_voc_area"]),
            "" if entry["delta"] is None else f"{100 * entry['delta']:+.1f}",
        )
    return table


def plan_lines(plan: Plan) -> Iterator[str]:
    """One line for each module: path, bits of each slot, the rule or the reason; then what was skipped."""
    for module in plan.modules:
        bits = " ".join(f"{s.slot}={'float' if s.format is None else s.format.bits}" for s in module.slots)
        rules = ", ".join(dict.fromkeys(s.rule for s in module.slots if s.rule))
        yield f"  {module.path}  [{module.role}]  {bits}  {module.reason or rules}"
    yield from plan.skipped


def cost_table(plan: Plan, parameters: int = 0) -> Table:
    """What an image costs in float and quantized."""
    table = Table("per image", "float", "quantized", title="cost", title_justify="left")
    for name, before, after in plan.costs(parameters):
        table.add_row(name, before, after)
    return table


def kernel_table(kernels: Kernels) -> Table:
    """How many convolutions, linear layers and products run on integer kernels."""
    table = Table("operations", title=f"in {TITLES[kernels.runtime]}", title_justify="left")
    for heading in ("integer kernels", "float kernels"):
        table.add_column(heading, justify="right")
    for kind in kernels.kinds():
        integer, every = kernels.count(kind)
        table.add_row(f"{kind}s", str(integer), str(every - integer))
    return table


def float_lines(floats: Sequence[FloatOperation], most: int = 12) -> Iterator[str]:
    """The modules that run in float, by the reason for it."""
    reasons: dict[str, list[str]] = {}
    for each in floats:
        paths = reasons.setdefault(each.reason or "although it is planned in integers", [])
        paths += [each.path] if each.path not in paths else []
    for reason, paths in reasons.items():
        more = f" and {len(paths) - most} more" if len(paths) > most else ""
        yield f"in float, {reason}: {', '.join(paths[:most])}{more}"


def parity_lines(parity: Parity) -> Iterator[str]:
    """How far the file is from the model."""
    yield from parity.lines()


def file_lines(result: Exported) -> Iterator[str]:
    """What was written, and how large it is."""
    ratio = result.float_bytes / result.bytes
    yield (
        f"{result.bytes / 1e6:.2f} MB on disk; the weights in float32 take {result.float_bytes / 1e6:.2f} MB "
        f"({ratio:.1f} times as much)"
    )
    yield f"{', '.join(map(str, result.files))}: written"


def benchmark_table(result: Benchmarked) -> Table:
    """A line for each candidate."""
    height, width = result.size
    of, on = f"{result.batch} x {height}x{width}", f"{result.threads} thread{'s' * (result.threads > 1)}"
    runs = min(timing.runs for timing in result.timings)
    title = f"{of}, {on}, {runs} runs of each or more, in turns"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "runtime"):
        table.add_column(heading, no_wrap=heading != "")
    for heading in ("ms", "p90", "images/s", "RAM MB", "disk MB", "x float"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing, reference in zip(result.timings, result.references, strict=True):
        own = timing.candidate
        table.add_row(
            escape(own.name),
            TITLES[own.job.runtime],
            *(f"{1e3 * seconds:.1f}" for seconds in (timing.median, timing.p90)),
            f"{timing.images_per_second:.1f}",
            f"{timing.peak_memory_mb:.0f}",
            f"{own.size_bytes / 1e6:.1f}",
            "" if reference is None else f"{timing.speedup(reference):.2f}",
        )
    return table


def benchmark_lines(result: Benchmarked) -> Iterator[str]:
    """What must be said beside the table: what is slower than float, and what the numbers hold for."""
    yield (
        "ms: median latency, and what one run of ten passes; RAM: the most that the process held, libraries "
        "included; x float: speed over the float model's in the same runtime"
    )
    for timing, reference in zip(result.timings, result.references, strict=True):
        yield from _verdict(timing, reference)
    machine = result.machine
    yield f"{machine['cpu']} ({', '.join(machine['instructions']) or 'no integer instructions known'})"
    if result.busy:
        yield (
            f"warning: the machine is busy (load {machine['load']} on {machine['cores']} cores): the times "
            "are too long; the ratios are of neighbouring turns, which suffer alike"
        )


def _verdict(timing: Timing, reference: Timing | None) -> Iterator[str]:
    """A line for a quantized candidate that is slower than float, or that nothing can be said of."""
    own = timing.candidate
    runtime = TITLES[own.job.runtime]
    if reference is not None and timing.speedup(reference) < 1:
        share = f"{timing.speedup(reference):.2f} of its speed"
        yield f"SLOWER: {own.name} is slower than the float model in {runtime}: {share}"
    elif reference is None and own.quantized:
        yield (
            f"{own.name}: no one float model in {runtime} stands beside it; name the MODEL that it was "
            "exported from"
        )


def points(value: float | None) -> str:
    """AP in points with one decimal, and a dash where there is no object to measure on."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def count(value: int) -> str:
    """A large number with its unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)


def _by_role(found: Inspection) -> dict[str, tuple[int, int, int]]:
    """Of each role (modules, MACs, weights)."""
    sums: dict[str, tuple[int, int, int]] = {}
    for layer in found.facts.layers:
        number, macs, weights = sums.get(layer.role, (0, 0, 0))
        sums[layer.role] = (number + 1, macs + layer.macs, weights + layer.weights)
    for attention in found.facts.attentions:
        number, macs, weights = sums.get(attention.role, (0, 0, 0))
        sums[attention.role] = (number + 1, macs + attention.macs, weights)
    return sums
