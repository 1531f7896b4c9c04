"""Which of a file's operations run on integer kernels, as the runtime's own profile says."""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["convolution", "linear", "product"]
KINDS: tuple[Kind, ...] = ("convolution", "linear", "product")
_OF_MODULE = re.compile(rf"(?P<path>.+):({'|'.join(KINDS)})(:(?P<call>\d+))?(\.bias)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One convolution, linear layer or product of activations, as it was executed."""

    name: str  # of the node in the file
    kind: Kind
    integer: bool
    kernel: str  # what the runtime calls it, e.g. QLinearConv or brgemm_avx512_amx_I8

    @property
    def path(self) -> str | None:
        """The module that it is of; None where its name does not say."""
        found = _OF_MODULE.fullmatch(self.name)
        return None if found is None else found["path"]

    @property
    def call(self) -> int:
        """Which one of its module's operations of this kind it is, from 0."""
        found = _OF_MODULE.fullmatch(self.name)
        return 0 if found is None else int(found["call"] or 0)


def names_a_module(name: str) -> bool:
    """Whether the name of a node says which module it is of."""
    return _OF_MODULE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Every convolution, linear layer and product of activations that the runtime executed."""

    runtime: str  # as `sessions.Runtime` has it
    operations: tuple[Operation, ...]

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that there are."""
        return tuple(kind for kind in KINDS if self.count(kind)[1])

    def count(self, kind: Kind) -> tuple[int, int]:
        """(on integer kernels, all) of a kind."""
        own = [each for each in self.operations if each.kind == kind]
        return sum(each.integer for each in own), len(own)

    def floats(self) -> tuple[Operation, ...]:
        """The operations that run in float."""
        return tuple(each for each in self.operations if not each.integer)
