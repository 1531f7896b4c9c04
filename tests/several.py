"""Processes that torchrun could have launched, as forks of one that has imported everything already."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Not forks of the tests' process: torch's autograd may have run in it, and cannot in a fork then.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        *(
            "qdetr_cli.pipeline",
            "qdetr_cli.report",
            "qdetr_cli.plots",
            "tiny_runs",
            "transformers.quantizers.auto",
        ),
        *("transformers.models.detr.modeling_detr", "torch._dynamo", "torch.distributed.elastic.agent"),
    ]
)
PATIENCE = 120  # seconds after which processes hang


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, what it printed, and what its work gave back."""

    code: int
    out: str
    err: str
    result: Any


def in_processes(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Ended]:
    """How `count` processes ended that all did `work`, launched as torchrun does; none may hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = [
        processes.Process(target=_run, args=(rank, count, port, folder, work, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    hanging = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    assert not hanging, (hanging, [_text(folder / f"{rank}.err") for rank in range(count)])
    return [_ended(process.exitcode, folder, rank) for rank, process in enumerate(started)]


def results(ended: list[Ended]) -> list[Any]:
    """What each process gave back; all must have succeeded."""
    assert [each.code for each in ended] == [0] * len(ended), "\n".join(each.err for each in ended)
    return [each.result for each in ended]


def _run(rank: int, count: int, port: int, folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    launched = where | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in launched.items()})
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of a launcher
    try:
        result = work(*arguments)
    except SystemExit as end:
        _leave(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        _leave(1)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    _leave(0)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ended(code: int | None, folder: Path, rank: int) -> Ended:
    path = folder / f"{rank}.pickle"
    result = pickle.loads(path.read_bytes()) if path.exists() else None
    assert code is not None
    return Ended(code, _text(folder / f"{rank}.out"), _text(folder / f"{rank}.err"), result)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
