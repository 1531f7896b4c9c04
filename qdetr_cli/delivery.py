"""What comes after training: a file that runs, and how fast it and its rivals are."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from qdetr_cli.benchmark.machine import is_busy, machine
from qdetr_cli.benchmark.turns import TURN, measured
from qdetr_cli.candidates import (
    candidates,
    chosen_runtimes,
    common_setting,
    opened,
    reference_of,
)
from qdetr_cli.errors import ExportError
from qdetr_cli.exporting import (
    Target,
    check_space,
    check_target,
    export_size,
    exported_file,
    packed_folder,
    parse_batch,
    parse_export_size,
    refuse_settings,
    told,
)
from qdetr_cli.models import Source, open_model, parse_size
from qdetr_cli.plugins import load as load_plugins
from qdetr_cli.results import Benchmarked, DataSource, Exported, Listener
from qdetr_cli.splits import open_split


def export(
    source: Source,
    *,
    to: str | None = None,
    out: Path,
    size: str | None = None,
    batch: str = "1",
    portable: bool | None = None,
    data: DataSource | None = None,
    threads: int | None = None,
    plugins: Sequence[Path] = (),
    listener: Listener,
) -> Exported:
    """Write a model as a file of a runtime, run it, and compare it with the model; or pack its weights.

    What `to`, `size` and `portable` leave open, the recipe of the model says. With `data` the AP of both is
    measured. A file that differs by more than rounding is not kept.
    """
    began = time.perf_counter()
    (wanted, any_size), images = parse_export_size(size), parse_batch(batch)
    load_plugins(plugins)
    model = open_model(source, listener.say) if to is None else None
    to = to or told(model).to
    target: Target = check_target(to, out)
    if not target.suffix:
        given = {"--size": size, "--data": data, "--portable": portable}
        used = {name: each is not None for name, each in given.items()}
        refuse_settings(to, used | {"--batch": batch != "1"})
    evaluation = None if data is None else open_split(data, data.split, listener)
    model = model or open_model(source, listener.say)
    if model.plan is None and portable is not None:
        raise ExportError("--portable would have no effect on a float model; leave it out")
    check_space(out, model)
    if not target.suffix:
        return packed_folder(model, out, began)
    return exported_file(
        model,
        to,
        out,
        export_size(model, wanted or told(model).size),
        evaluation,
        threads,
        batch=images,
        any_size=any_size,
        portable=told(model).portable if portable is None else portable,
        began=began,
        listener=listener,
    )


def benchmark(
    sources: Sequence[Source],
    *,
    size: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    runs: int = 30,
    runtimes: Sequence[str] = (),
    plugins: Sequence[Path] = (),
    listener: Listener,
) -> Benchmarked:
    """Latency, throughput, memory and size of models and files, side by side."""
    load_plugins(plugins)
    wanted = parse_size(size)
    chosen = chosen_runtimes(runtimes, listener)
    named = [opened(each, listener) for each in sources]
    setting = common_setting(named, size=wanted, batch=batch, threads=threads, plugins=plugins)
    found = machine()
    with tempfile.TemporaryDirectory(prefix="qdetr-benchmark-") as folder:
        rivals = list(candidates(named, setting, chosen, Path(folder), listener))
        turns = len(rivals) * -(-runs // TURN)
        with listener.progress("benchmark (turns)", turns) as advance:
            timings = measured(rivals, runs=runs, advance=advance)
    return Benchmarked(
        size=setting.size,
        batch=setting.batch,
        threads=setting.threads,
        timings=timings,
        references=tuple(reference_of(each, timings) for each in timings),
        machine=found,
        busy=is_busy(found),
    )
