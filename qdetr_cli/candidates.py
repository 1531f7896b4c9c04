"""What `qdetr benchmark` runs: files as they are, and a model in torch and, exported, in the runtimes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdetr_cli.artefact import open_artefact
from qdetr_cli.benchmark.turns import Candidate, Timing
from qdetr_cli.benchmark.worker import Job
from qdetr_cli.errors import ExportError
from qdetr_cli.exporting import TARGETS, export_size, float_bytes, write
from qdetr_cli.models import Model, Source, open_model
from qdetr_cli.results import Listener
from qdetr_cli.runs import writing
from qdetr_cli.sessions import SUFFIXES, TITLES, available, cores, is_exported

Size = tuple[int, int]

RUNTIMES = ("torch", "onnxruntime", "openvino")
_TARGET = {"onnxruntime": "onnx", "openvino": "openvino"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What holds for every candidate."""

    size: Size
    batch: int
    threads: int
    plugins: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One MODEL or FILE as it was named, opened: of a file (quantized, family), of a model the model."""

    source: Source
    family: str
    model: Model | None
    quantized: bool
    size: Size | None  # None: any
    batch: int | None  # None: any
    bytes: int  # of a file

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(self.source.model).name or self.source.model


def opened(source: Source, listener: Listener) -> Named:
    """The MODEL or FILE, opened once to know what it is."""
    path = Path(source.model)
    if not is_exported(path):
        model = open_model(source, listener.say)
        return Named(
            source=source,
            family=model.family.name,
            model=model,
            quantized=model.plan is not None,
            size=None,
            batch=None,
            bytes=0,
        )
    artefact = open_artefact(path, threads=1)
    inputs = artefact.session.inputs
    return Named(
        source=source,
        family=artefact.metadata.family,
        model=None,
        quantized=artefact.metadata.quantized,
        size=inputs.size,
        batch=inputs.batch,
        bytes=file_bytes(path),
    )


def common_setting(
    named: Sequence[Named],
    *,
    size: Size | None,
    batch: int | None,
    threads: int | None,
    plugins: Sequence[Path],
) -> Setting:
    """The size, batch and threads for all. Raises ExportError where a file cannot take them."""
    models = [each.model for each in named if each.model is not None]
    sizes = [each.size for each in named if each.size is not None]
    batches = [each.batch for each in named if each.batch is not None]
    chosen = size or (sizes[0] if sizes else export_size(models[0], None) if models else (640, 640))
    count = batch or (batches[0] if batches else 1)
    for each in named:
        if each.size not in (None, chosen) or each.batch not in (None, count):
            raise ExportError(
                f"{each.source.model}: is fixed to {_shape(each)}, so it cannot be measured at {count} x "
                f"{chosen[0]}x{chosen[1]}; export it at that size, or measure it alone"
            )
    for model in models:
        export_size(model, chosen)
    most = cores()
    if threads is not None and threads > most:
        raise ExportError(f"--threads {threads}: this process may use {most} cores; choose 1 to {most}")
    return Setting(
        size=chosen,
        batch=count,
        threads=threads or most,
        plugins=tuple(str(each.resolve()) for each in plugins),
    )


def chosen_runtimes(names: Sequence[str], listener: Listener) -> tuple[str, ...]:
    """The runtimes of models: as named, else all that are installed. Raises ExportError for others."""
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise ExportError(f"--runtime {unknown[0]}: is not one of {', '.join(RUNTIMES)}")
    missing = [name for name in RUNTIMES if not available(name)]
    absent = next((name for name in names if name in missing), None)
    if absent is not None:
        raise ExportError(f'--runtime {absent} needs {TITLES[absent]}: pip install "qdetr[export]"')
    for name in missing:
        if not names:
            listener.say(f'{TITLES[name]} is not installed, so it is left out: pip install "qdetr[export]"')
    return tuple(name for name in RUNTIMES if name in (names or RUNTIMES) and name not in missing)


def candidates(
    named: Sequence[Named], setting: Setting, runtimes: Sequence[str], folder: Path, listener: Listener
) -> Iterator[Candidate]:
    """Every candidate; exports of models are written into `folder`.

    A model stands for its float weights in each runtime, and, unless files were named for that, for its
    quantized exports too.
    """
    files = any(each.model is None for each in named)
    for number, each in enumerate(named):
        if each.model is None:
            yield _file_candidate(each, setting)
        else:
            own = folder / str(number)
            own.mkdir()
            yield from _model_candidates(each, each.model, setting, runtimes, own, not files, listener)


def reference_of(timing: Timing, timings: Sequence[Timing]) -> Timing | None:
    """The float model beside a quantized one: in the same runtime, of the same MODEL, else the only one."""
    own = timing.candidate
    if not own.quantized:
        return None
    fits = [
        each
        for each in timings
        if not each.candidate.quantized
        and each.candidate.job.runtime == own.job.runtime
        and each.candidate.family == own.family
    ]
    same = [each for each in fits if each.candidate.origin == own.origin] or fits
    return same[0] if len(same) == 1 else None


def file_bytes(path: Path) -> int:
    """The size of an exported file with what belongs to it."""
    parts = (path, path.with_suffix(".bin")) if SUFFIXES[path.suffix.lower()] == "openvino" else (path,)
    return sum(each.stat().st_size for each in parts)


def _model_candidates(
    named: Named,
    model: Model,
    setting: Setting,
    runtimes: Sequence[str],
    folder: Path,
    integers: bool,
    listener: Listener,
) -> Iterator[Candidate]:
    """The float weights in every runtime and, with `integers`, the quantized exports."""
    for runtime in runtimes:
        if runtime == "torch":
            yield _candidate(named, setting, runtime, Path(named.source.model), float_bytes(model), False)
            continue
        for quantized in (False, True) if named.quantized and integers else (False,):
            kind = "quantized" if quantized else "float"
            listener.say(f"{named.name}: exporting it, {kind}, for {TITLES[runtime]}")
            path = folder / f"{kind}{TARGETS[_TARGET[runtime]].suffix}"
            with writing(path):
                write(
                    model,
                    _TARGET[runtime],
                    setting.size,
                    path,
                    batch=setting.batch,
                    quantized=quantized,
                )
            yield _candidate(named, setting, runtime, path, file_bytes(path), quantized)


def _file_candidate(named: Named, setting: Setting) -> Candidate:
    path = Path(named.source.model)
    return _candidate(named, setting, SUFFIXES[path.suffix.lower()], path, named.bytes, named.quantized)


def _candidate(
    named: Named, setting: Setting, runtime: str, path: Path, size: int, quantized: bool
) -> Candidate:
    job = Job(
        runtime=runtime,
        path=str(path) if runtime != "torch" else named.source.model,
        threads=setting.threads,
        batch=setting.batch,
        size=setting.size,
        original=dict(named.source.original),
        plugins=setting.plugins,
    )
    kind = "" if named.model is None else ", quantized" if quantized else ", float"
    return Candidate(
        name=named.name + kind,
        job=job,
        quantized=quantized,
        size_bytes=size,
        origin=named.source.model,
        family=named.family,
    )


def _shape(named: Named) -> str:
    images = "any number of images" if named.batch is None else f"{named.batch} images"
    size = "any size" if named.size is None else f"{named.size[0]}x{named.size[1]}"
    return f"{images} of {size}"
