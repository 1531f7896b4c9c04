"""Several processes as one: they share the work out, agree, and the first writes. Alone, nothing is done.

Every function here is a meeting: all processes must call it, in the same order. Where one fails between two
meetings it notes its message and leaves; the others find the line cut, and leave too.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from qdetr_cli.devices import torch_device
from qdetr_cli.errors import QDetrError, RunError
from qdetr_cli.launch import check_launch, is_first, launched_processes

TIMEOUT = timedelta(minutes=30)  # the others wait as long while the first calibrates, measures or writes
_FAULT, _CLAIM = "qdetr/fault", "qdetr/claim"
_CPU = torch.device("cpu")
_store: list[Any] = []  # where the processes of this launch leave notes

P = ParamSpec("P")
R = TypeVar("R")


def world() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if met() else 1


def rank() -> int:
    """The number of this process; the first, 0, writes."""
    return distributed.get_rank() if met() else 0


def met() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()


def jointly(command: Callable[P, R]) -> Callable[P, R]:
    """`command` (with a keyword `device`) as the work of all processes that were launched together."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with joined(str(kwargs.get("device", "auto"))):
            return command(*args, **kwargs)

    return run


@contextmanager
def joined(device: str) -> Iterator[None]:
    """For the duration of the block the launched processes are one group: nccl for CUDA, gloo for the rest.

    A mistake that one of them meets is raised in all. Raises RunError for launches that are not supported.
    """
    check_launch()
    if launched_processes() == 1 or met():
        yield
        return
    store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
    _store[:] = [store]
    backend = "gloo" if torch_device(device).type == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    try:
        yield
    except QDetrError as error:
        store.set(_FAULT, str(error))
        raise
    except RuntimeError as error:  # gloo's, when another process is gone
        if not store.check([_FAULT]):
            raise
        raise RunError(store.get(_FAULT).decode()) from error
    distributed.destroy_process_group()


def speaks() -> bool:
    """Whether this process is the one to print why the work ended: the first of the group that asks."""
    if not _store:
        return is_first()
    try:
        return bool(_store[0].add(_CLAIM, 1) == 1)
    except RuntimeError:
        return False  # the process that held the notes is gone, and has spoken


def from_first(work: Callable[[], R]) -> R:
    """What `work` gives on the first process, on every process; a mistake that it meets is raised in all."""
    if world() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome = [work(), None]
        except QDetrError as error:
            outcome = [None, error]
    distributed.broadcast_object_list(outcome, src=0, device=_CPU)
    result, mistake = outcome
    if mistake is not None:
        raise mistake
    found: R = result
    return found


def gathered(value: R) -> list[R]:
    """The values of all processes, in their order, on every process."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def largest(values: Sequence[int]) -> list[int]:
    """The largest of each value over the processes."""
    if world() == 1:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.int64)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    found: list[int] = tensor.tolist()
    return found


def mean(x: Tensor) -> Tensor:
    """The mean of x over the processes, without gradient if there are several; alone it is x itself."""
    if world() == 1:
        return x
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total / world()


def average_gradients(module: nn.Module) -> None:
    """Give every parameter the mean gradient over the processes, one that it has not counting as zero."""
    if world() == 1:
        return
    for parameter in module.parameters():
        if parameter.requires_grad:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = mean(own)


@torch.no_grad()
def make_alike(module: nn.Module) -> None:
    """Give the module on every process the parameters and buffers that it has on the first."""
    if world() == 1:
        return
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    for value in state.values():
        distributed.broadcast(value, src=0)
    module.load_state_dict(state)  # which also tells quantizers that they are calibrated
