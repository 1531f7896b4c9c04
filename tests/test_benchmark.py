"""Candidates that take turns: what is counted, in which order, and what is said of it."""

import dataclasses
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from exported_files import metadata, write_file, write_onnx
from tiny_runs import Told, as_json, ok, refused, write_model

from qdetr_cli.benchmark import machine, turns
from qdetr_cli.benchmark.turns import COLD, TURN, Candidate, Timing, measured, worker
from qdetr_cli.benchmark.worker import Job, peak_memory
from qdetr_cli.candidates import chosen_runtimes, reference_of
from qdetr_cli.errors import ExportError
from qdetr_cli.results import Benchmarked
from qdetr_cli.tables import benchmark_lines, benchmark_table


def candidate(name: str = "m.onnx", runtime: str = "onnxruntime", **changes) -> Candidate:
    job = Job(
        runtime=runtime, path=name, threads=1, batch=1, size=(64, 96), original={}, plugins=(), **changes
    )
    return Candidate(name=name, job=job, quantized=False, size_bytes=10, origin=name, family="detr")


def timing(
    *turns_of: tuple[float, ...],
    name: str = "m.onnx",
    quantized: bool = False,
    runtime: str = "onnxruntime",
    origin: str = "m",
) -> Timing:
    own = dataclasses.replace(candidate(name, runtime), quantized=quantized, origin=origin)
    return Timing(
        candidate=own,
        version="1",
        load_seconds=0.1,
        memory_before_mb=50.0,
        peak_memory_mb=80.0,
        wall=turns_of,
        cpu=turns_of,
    )


# --- numbers ---


def test_median_p90_and_throughput_are_over_all_runs():
    found = timing((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (7.0, 8.0, 9.0), (10.0, 11.0))
    assert found.median == 6.0
    assert found.p90 == pytest.approx(10.0)
    assert found.images_per_second == pytest.approx(1 / 6)
    own = dataclasses.replace(found.candidate, job=dataclasses.replace(found.candidate.job, batch=4))
    assert dataclasses.replace(found, candidate=own).images_per_second == pytest.approx(4 / 6)


def test_the_speedup_is_of_neighbouring_turns():
    """The machine slows down threefold half-way: the ratio of all medians would say 1, or 6."""
    fast = timing((1.0, 1.0), (1.0, 1.0), (3.0, 3.0))
    slow = timing((2.0, 2.0), (2.0, 9.0), (6.0, 6.0))
    assert fast.speedup(slow) == pytest.approx(2.0)
    assert slow.speedup(fast) == pytest.approx(0.5)


class Fake:
    """A worker that is told to run and notes it."""

    def __init__(self, log: list, name: str):
        self.log, self.name = log, name

    def warm_up(self) -> None:
        self.log.append((self.name, "warm"))

    def take_turn(self) -> None:
        self.log.append((self.name, "turn"))

    def end(self) -> str:
        return self.name


def test_all_warm_up_and_then_take_turns_in_a_rotating_order(monkeypatch):
    log: list = []

    @contextmanager
    def fake(each):
        yield Fake(log, each.name)

    monkeypatch.setattr(turns, "worker", fake)
    done = []
    found = measured([candidate(name) for name in "abc"], runs=3 * TURN - 1, advance=done.append)
    assert found == ("a", "b", "c")
    assert log[:3] == [(name, "warm") for name in "abc"]
    assert "".join(name for name, _ in log[3:]) == "abcbcacab"
    assert done == [1] * 9


def test_a_turn_is_longer_for_what_is_quick(monkeypatch):
    each = turns.Worker(candidate=candidate(), process=None, complaints=None)
    taken = iter([0.002, 0.010, 1.0, 1.0])
    monkeypatch.setattr(turns.Worker, "run", lambda self, times: {"wall": [next(taken), next(taken)]})
    each.warm_up()
    assert (each.cold, each.turn) == (25, 75)
    each.warm_up()
    assert (each.cold, each.turn) == (COLD, TURN)


def test_the_first_runs_of_a_turn_are_not_counted(monkeypatch):
    each = turns.Worker(candidate=candidate(), process=None, complaints=None, cold=2, turn=3)
    monkeypatch.setattr(
        turns.Worker, "run", lambda self, times: {"wall": list(range(times)), "cpu": list(range(times))}
    )
    each.take_turn()
    assert each.wall == each.cpu == [(2, 3, 4)]


# --- processes ---


def test_a_file_is_measured_in_a_process_without_torch(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    (found,) = measured([candidate(str(path))], runs=4)
    assert len(found.wall) == len(found.cpu) == 2
    assert found.runs == sum(map(len, found.wall)) > 2 * TURN  # it is done in microseconds
    assert all(seconds > 0 for turn in found.wall for seconds in turn)
    assert 0 < found.memory_before_mb <= found.peak_memory_mb < 250  # torch alone takes more
    assert found.version[0].isdigit()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="where the kernel says it")
def test_peak_memory_is_that_of_this_process_alone():
    """`ru_maxrss` of a new process begins at its parent's."""
    held = b"1" * 400_000_000
    code = "from qdetr_cli.benchmark.worker import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory() > 400 > 200 > float(done.stdout)
    assert held


def test_the_threads_are_in_the_environment_of_the_process(tmp_path, monkeypatch):
    seen = {}
    real = turns.subprocess.Popen

    def popen(command, **options):
        seen.update(options["env"])
        return real(command, **options)

    monkeypatch.setattr(turns.subprocess, "Popen", popen)
    with worker(candidate(str(write_onnx(tmp_path / "m.onnx")))):
        pass
    assert {seen[name] for name in turns.THREAD_VARIABLES} == {"1"}


def test_a_candidate_that_cannot_be_loaded_is_one_message(tmp_path):
    (tmp_path / "m.onnx").write_text("no model")
    with pytest.raises(ExportError, match=r"m\.onnx: ONNX Runtime cannot load it"):
        measured([candidate(str(tmp_path / "m.onnx"))], runs=3)


def test_a_process_that_dies_says_why(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    wrong = candidate(str(path))
    wrong = dataclasses.replace(wrong, job=dataclasses.replace(wrong.job, size=(32, 32)))
    with pytest.raises(ExportError, match=r"m\.onnx: cannot run at 1 x 32x32: .*invalid dimensions"):
        measured([wrong], runs=3)


def test_a_process_that_is_killed_is_said_to_be(tmp_path):
    with worker(candidate(str(write_onnx(tmp_path / "m.onnx")))) as each:
        each.process.kill()
        each.process.wait()
        with pytest.raises(ExportError, match="ran out of memory, or was killed"):
            each.run(1)


def test_no_process_stays_when_the_block_is_left(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        worker(candidate(str(write_onnx(tmp_path / "m.onnx")))) as each,
    ):
        raise KeyboardInterrupt
    assert each.process.returncode is not None


def test_a_job_comes_back_from_json():
    job = dataclasses.replace(candidate().job, plugins=("a",), original={"heads": 8})
    assert Job.from_json(job.to_json()) == job


# --- what is compared with what ---


def rows(*shown: tuple[str, str, bool, str]) -> list[Timing]:
    return [
        timing((1.0,), name=name, runtime=runtime, quantized=quantized, origin=origin)
        for name, runtime, quantized, origin in shown
    ]


def test_a_quantized_row_stands_beside_float_in_its_runtime():
    found = rows(
        ("float torch", "torch", False, "m"),
        ("float onnx", "onnxruntime", False, "m"),
        ("q onnx", "onnxruntime", True, "m"),
        ("q openvino", "openvino", True, "m"),
    )
    assert [reference_of(each, found) for each in found] == [None, None, found[1], None]


def test_of_several_float_models_that_of_the_same_origin_counts():
    found = rows(
        ("a", "onnxruntime", False, "a"),
        ("b", "onnxruntime", False, "b"),
        ("q of b", "onnxruntime", True, "b"),
        ("q of c", "onnxruntime", True, "c"),
    )
    assert reference_of(found[2], found) is found[1]
    assert reference_of(found[3], found) is None


def result(*pairs: tuple[Timing, Timing | None], busy: bool = False) -> Benchmarked:
    return Benchmarked(
        size=(64, 96),
        batch=1,
        threads=1,
        timings=tuple(each for each, _ in pairs),
        references=tuple(each for _, each in pairs),
        machine=machine.machine() | {"load": 7.5, "cores": 2},
        busy=busy,
    )


def test_what_is_slower_than_float_is_said_plainly():
    base = timing((1.0,), name="float")
    slow, quick = timing((2.0,), name="slow", quantized=True), timing((0.5,), name="quick", quantized=True)
    said = "\n".join(benchmark_lines(result((base, None), (slow, base), (quick, base))))
    assert "SLOWER: slow is slower than the float model in ONNX Runtime: 0.50 of its speed" in said
    assert said.count("SLOWER") == 1
    assert "busy" not in said


def test_a_quantized_file_alone_asks_for_its_float_model():
    said = "\n".join(benchmark_lines(result((timing((1.0,), quantized=True), None), busy=True)))
    assert "no one float model in ONNX Runtime stands beside it" in said
    assert "warning: the machine is busy (load 7.5 on 2 cores)" in said


def test_the_table_has_a_line_for_each():
    base, own = timing((0.002,), name="a"), timing((0.001,), name="b", quantized=True)
    table = benchmark_table(result((base, None), (own, base)))
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["a", "b"]
    assert cells[2] == ["2.0", "1.0"]
    assert cells[-1] == ["", "2.00"]


@pytest.mark.parametrize(("load", "busy"), [(0.9, False), (1.1, True), (None, False)])
def test_busy_is_more_than_half_of_the_cores(load, busy):
    assert machine.is_busy({"load": load, "cores": 2}) is busy


def test_the_machine_names_its_cpu():
    found = machine.machine()
    assert found["cpu"]
    assert found["cores"] >= 1


# --- runtimes ---


def test_runtimes_in_their_order_and_unknown_ones_refused():
    assert chosen_runtimes(("openvino", "torch"), Told()) == ("torch", "openvino")
    with pytest.raises(ExportError, match="tensorrt: is not one of torch, onnxruntime, openvino"):
        chosen_runtimes(("tensorrt",), Told())


def test_a_runtime_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("qdetr_cli.candidates.available", lambda name: name != "openvino")
    told = Told()
    assert chosen_runtimes((), told) == ("torch", "onnxruntime")
    assert 'OpenVINO is not installed, so it is left out: pip install "qdetr[export]"' in told.text
    with pytest.raises(ExportError, match=r"--runtime openvino needs OpenVINO: pip install"):
        chosen_runtimes(("openvino",), told)


# --- the command ---


def test_files_side_by_side(tmp_path):
    first = write_file(tmp_path / "a.onnx", told=metadata())
    second = write_file(tmp_path / "b.xml", told=metadata(recipe=None))
    found = as_json("benchmark", first, second, "--threads", 1, "--runs", 3)
    assert {"size", "batch", "threads", "machine", "busy", "candidates"} == set(found)
    assert (found["size"], found["batch"], found["threads"]) == ([64, 96], 1, 1)
    assert [(row["name"], row["runtime"]) for row in found["candidates"]] == [
        ("a.onnx", "onnxruntime"),
        ("b.xml", "openvino"),
    ]
    for row in found["candidates"]:
        assert 0 < row["latency_ms"]["median"] <= row["latency_ms"]["p90"]
        assert row["peak_memory_mb"] > row["memory_before_loading_mb"] > 0
        assert row["version"][0].isdigit()
        assert row["runs"] >= 3
        assert len(row["turns_ms"]) == 1
    sizes = [os.path.getsize(first), sum(os.path.getsize(tmp_path / name) for name in ("b.xml", "b.bin"))]
    assert [row["size_mb"] for row in found["candidates"]] == [round(size / 1e6, 3) for size in sizes]
    assert found["machine"]["cpu"]


def test_a_float_model_beside_its_file(tmp_path):
    model = write_model(tmp_path / "model")
    file = write_file(tmp_path / "q.onnx", told=metadata())
    text = ok("benchmark", model, file, "--threads", 1, "--runs", 3, "--runtime", "torch").stdout
    assert "model, float" in text
    assert "q.onnx" in text
    assert "1 x 64x96, 1 thread, " in text


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        (("--size", "32x32"), "is fixed to any number of images of 64x96"),
        (("--threads", "4096"), "this process may use"),
        (("--runtime", "tensorrt"), "is not one of torch, onnxruntime, openvino"),
        (("--size", "small"), "is not HxW"),
    ],
    ids=["size", "threads", "runtime", "no size"],
)
def test_what_cannot_be_measured_is_refused(tmp_path, extra, fault):
    assert fault in refused("benchmark", write_file(tmp_path / "a.onnx", told=metadata()), *extra)


def test_files_of_different_sizes_are_refused(tmp_path):
    first = write_file(tmp_path / "a.onnx", told=metadata())
    second = write_file(tmp_path / "b.onnx", size=(32, 32), batch=2, told=metadata())
    assert "b.onnx: is fixed to 2 images of 32x32" in refused("benchmark", first, second)
