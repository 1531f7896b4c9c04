"""A bound on the size of a model while it is built, so that a config cannot fill the memory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qdetr_cli.errors import CheckpointError
from qdetr_cli.reading import check_regular

# Models make some parameters that they share or drop in the end, and qdetr folds batch norms.
_SPARE_VALUES, _SPARE_TENSORS, _TIMES = 1 << 22, 4096, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the weights of a checkpoint can fill: so many values in so many tensors, of the file `where`."""

    values: int
    tensors: int
    where: str

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Raise CheckpointError as soon as a model outgrows the budget within the block.

        Parameters are counted when a module gets them, before they are filled: memory is not used yet.
        """
        values = tensors = 0

        def count(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
            nonlocal values, tensors
            values, tensors = values + (0 if parameter is None else parameter.numel()), tensors + 1
            most = _TIMES * self.values + _SPARE_VALUES, _TIMES * self.tensors + _SPARE_TENSORS
            if values > most[0] or tensors > most[1]:
                raise CheckpointError(
                    f"{self.where}: holds {self.values} values in {self.tensors} tensors, and its config "
                    "describes a model with many times as much; one of both is damaged"
                )

        handle = register_module_parameter_registration_hook(count)
        try:
            yield
        finally:
            handle.remove()


def budget_of(files: Iterable[Path], where: str) -> Budget:
    """The budget of these weight files. Raises CheckpointError for what is no file or no safetensors."""
    values = tensors = 0
    for path in files:
        try:
            check_regular(path)
            more = _header(path) if path.suffix == ".safetensors" else (path.stat().st_size,) * 2
        except Exception as error:  # safetensors raises many types
            raise CheckpointError(
                f"{path}: the weights cannot be read ({error}); copy or save it again"
            ) from error
        values, tensors = values + more[0], tensors + more[1]
    return Budget(values=values, tensors=tensors, where=where)


def _header(path: Path) -> tuple[int, int]:
    """(values, tensors) of a safetensors file; a byte may hold four values of two bits."""
    with safe_open(path, framework="numpy") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
    return sum(prod(x.get_shape()) * (4 if x.get_dtype() == "U8" else 1) for x in slices), len(slices)
