"""The ablation's results as a table for people (mean and spread over seeds) and as a plot.

    python -m benchmarks.ablation_table benchmarks/results/ablation.csv

Gaps are float minus quantized, in points of AP50(voc-area). "Recovered" is the part of the baseline's gap
that a row closes, told where that gap is large enough for its part to mean something.
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Gaps = dict[tuple[str, str, str], list[float]]  # (model, bits, row) -> gap of each seed
BASELINE = "baseline"
CALIBRATED = "calibrated"  # the row that trains nothing, and so recovers nothing
TELLING = 0.5  # points: of a smaller gap of the baseline no part is told


def write_table(results: Path) -> None:
    """Write `<results>.md` and `<results>.png` beside the csv."""
    gaps = read_gaps(results)
    models = list(dict.fromkeys(model for model, _, _ in gaps))
    text = "\n".join(_table(model, gaps) for model in models)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(models, gaps, results.with_suffix(".png"))


def read_gaps(results: Path) -> Gaps:
    """The gap to float of every run, in points of AP50(voc-area)."""
    gaps: Gaps = defaultdict(list)
    with results.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            gap = 100 * (float(line["ap50_voc_area_float"]) - float(line["ap50_voc_area"]))
            gaps[line["model"], line["bits"], line["row"]].append(gap)
    return gaps


def _table(model: str, gaps: Gaps) -> str:
    bits = list(dict.fromkeys(bits for name, bits, _ in gaps if name == model))
    rows = list(dict.fromkeys(row for name, _, row in gaps if name == model))
    lines = [f"**{model}**: gap to float in points of AP50(voc-area), mean ± standard deviation (runs); ", ""]
    lines[0] += "in brackets the part of the baseline's gap that is recovered."
    lines += [f"| | {' | '.join(bits)} |", "|---" * (len(bits) + 1) + "|"]
    for row in rows:
        base = "" if row == CALIBRATED else BASELINE
        cells = [_cell(gaps.get((model, each, row), []), gaps.get((model, each, base), [])) for each in bits]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(gaps: list[float], baseline: list[float]) -> str:
    if not gaps:
        return ""
    mean = statistics.mean(gaps)
    spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
    base = statistics.mean(baseline) if baseline else 0.0
    share = f" [{100 * (1 - mean / base):.0f} %]" if base >= TELLING and gaps != baseline else ""
    return f"{mean:.2f}{spread} ({len(gaps)}){share}"


def _plot(models: list[str], gaps: Gaps, path: Path) -> None:
    """A row of panels per model, one per column of bits: a dot per run, a bar per mean of what was trained.

    The calibrated model, whose gap would dwarf all others, is told in the title.
    """
    bits = {model: list(dict.fromkeys(each for name, each, _ in gaps if name == model)) for model in models}
    width = max(map(len, bits.values()), default=1)
    figure, axes = pyplot.subplots(
        len(models), width, figsize=(3 * width + 1, 4 * len(models)), layout="constrained", squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        for axis in line[len(bits[model]) :]:
            axis.set_visible(False)
        for axis, each in zip(line, bits[model], strict=False):
            found = {row: values for (name, at, row), values in gaps.items() if (name, at) == (model, each)}
            _panel(axis, f"{model} {each}", found)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Axes, title: str, found: dict[str, list[float]]) -> None:
    trained = [row for row in found if row != CALIBRATED]
    for place, row in enumerate(trained):
        axis.barh(place, statistics.mean(found[row]), color="#9db7e4")
        axis.plot(found[row], [place] * len(found[row]), "o", color="#1f3d7a", markersize=4)
    axis.set_yticks(range(len(trained)), trained)
    axis.invert_yaxis()
    if CALIBRATED in found:
        title += f"\n{CALIBRATED}: {statistics.mean(found[CALIBRATED]):.2f}"
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("points of AP50 below float", fontsize=8)


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
