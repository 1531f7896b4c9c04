"""The words of a rule: operations, slots, roles, and the number format that a slot gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

Slot = Literal["weight", "input", "q", "k", "probs", "v", "output"]
Op = Literal["linear", "conv", "attention", "deformable", "residual"]
Granularity = Literal["tensor", "channel", "head"]

SLOTS: tuple[Slot, ...] = get_args(Slot)
OPS: tuple[Op, ...] = get_args(Op)
OP_SLOTS: dict[Op, tuple[Slot, ...]] = {
    "linear": ("weight", "input"),
    "conv": ("weight", "input"),
    "attention": ("q", "k", "probs", "v"),
    "deformable": ("probs", "v"),
    "residual": ("output",),
}
GRANULARITIES: dict[Slot, tuple[Granularity, ...]] = {
    "weight": ("tensor", "channel"),
    "input": ("tensor",),  # a step per input channel cannot leave the sum: not deployable (METHOD 1)
    "q": ("tensor", "head"),
    "k": ("tensor", "head"),
    "probs": ("tensor", "head"),
    "v": ("tensor", "head"),
    "output": ("tensor",),
}
ROLES: tuple[str, ...] = (
    "backbone.stem",
    "backbone",
    "backbone.attention",
    "backbone.residual",
    "input_proj",
    "encoder",
    "encoder.attention",
    "encoder.ffn",
    "encoder.conv",
    "decoder.self_attention",
    "decoder.cross_attention",
    "decoder.cross_attention.position",
    "decoder.ffn",
    "decoder.other",
    "class_head",
    "box_head",
    "box_head.last",
    "sampling",
    "query",
)
BITS: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)


def role_matches(pattern: str, role: str) -> bool:
    """True if `role` is `pattern` or one of its dotted children: `decoder` matches `decoder.ffn`."""
    return role == pattern or role.startswith(pattern + ".")


def role_names() -> tuple[str, ...]:
    """Every name that a rule may use for a role: the roles and their dotted prefixes."""
    prefixes = {role.split(".")[0] for role in ROLES}
    return tuple(sorted(prefixes.union(ROLES)))


class Section(BaseModel):
    """Base of every recipe type: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Partial(Section):
    """Base of the types whose None means "not stated": what is not stated is not written either."""

    @model_serializer(mode="wrap")
    def _stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value not in (None, [], ())}


def _check_option(value: Any) -> Any:
    if type(value) in (bool, int, float, str):
        return value
    raise PydanticCustomError("option", "an option is a number, a text, true or false")


Option = Annotated[bool | int | float | str, PlainValidator(_check_option)]


class Named(Section):
    """A plugin by name, with options: written `mse` or `{name: percentile, percent: 99.9}`."""

    name: str = Field(min_length=1)
    options: dict[str, Option] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and not isinstance(value.get("options"), dict):
            options = {key: option for key, option in value.items() if key != "name"}
            return {**({"name": value["name"]} if "name" in value else {}), "options": options}
        return value

    @model_serializer
    def _to_short(self) -> Any:
        return {"name": self.name, **self.options} if self.options else self.name


def _check_bits(value: Any) -> Any:
    if value in (None, "float") or (type(value) is int and value in BITS):
        return value
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    raise PydanticCustomError("bits", "{value} is not one of 2, 3, 4, 5, 6, 7, 8, float", {"value": shown})


class Format(Partial):
    """A number format, perhaps in part: what is left out falls to earlier rules, then to the slot.

    `align` puts Q-DETR's distribution alignment before the quantizer; only q and k have it. `balance` scales
    q and k against each other first; it belongs to q. `mid_rise` puts the levels at odd multiples of half a
    step, with none at 0; only weights have it.
    """

    bits: Annotated[int | Literal["float"] | None, BeforeValidator(_check_bits)] = None
    symmetric: bool | None = Field(default=None, strict=True)
    unsigned: bool | None = Field(default=None, strict=True)
    per: Granularity | None = None
    quantizer: Named | None = None
    init: Named | None = None
    align: bool | None = Field(default=None, strict=True)
    balance: bool | None = Field(default=None, strict=True)
    mid_rise: bool | None = Field(default=None, strict=True)

    @model_validator(mode="after")
    def _agrees(self) -> Format:
        if not any(value is not None for _, value in self):
            raise PydanticCustomError("empty", "sets nothing; give bits, or another key of a format")
        if self.unsigned and self.symmetric is False:
            raise PydanticCustomError(
                "offset", "an unsigned grid has no offset; drop unsigned or symmetric: false"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantFormat:
    """A complete number format: what a quantizer is made from.

    `per` is "tensor", "channel" or "head"; `unsigned` puts the grid at 0..2^b-1, else -2^(b-1)..2^(b-1)-1;
    `symmetric` means that there is no offset. `mid_rise` moves the grid by half a step: its levels are
    (q + 1/2) * step, as many above 0 as below.
    """

    bits: int
    symmetric: bool
    unsigned: bool
    per: str
    quantizer: str
    quantizer_options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    init: str
    init_options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    align: bool = False  # distribution alignment (Q-DETR's DA) goes before the quantizer
    balance: bool = False  # of q: q and k are scaled against each other before both are rounded
    mid_rise: bool = False

    @property
    def qmin(self) -> int:
        """Lowest integer of the grid."""
        return 0 if self.unsigned else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Highest integer of the grid."""
        return (1 << self.bits) - 1 if self.unsigned else (1 << (self.bits - 1)) - 1


_LSQ, _MSE = Named(name="lsq"), Named(name="mse")
_TOKENS = Format(symmetric=False, unsigned=False, per="head", quantizer=_LSQ, init=_MSE)
_MAPS = Format(symmetric=False, unsigned=False, per="tensor", quantizer=_LSQ, init=_MSE)
SLOT_DEFAULTS: dict[Slot, Format] = {
    "weight": Format(symmetric=True, unsigned=False, per="channel", quantizer=_LSQ, init=_MSE),
    "input": _MAPS,
    "q": _TOKENS,
    "k": _TOKENS,
    "v": _TOKENS,
    "probs": Format(symmetric=True, unsigned=True, per="head", quantizer=_LSQ, init=_MSE),
    "output": _MAPS,
}


def overlay(formats: Iterable[Format]) -> Format:
    """One format in which later formats win field by field; unset fields fall through.

    `unsigned: true` (no offset) and `symmetric: false` (an offset) cannot both hold: the later one decides.
    """
    fields: dict[str, Any] = {}
    for item in formats:
        stated = {name: value for name, value in item if value is not None}
        if stated.get("unsigned"):
            stated.setdefault("symmetric", True)
        if stated.get("symmetric") is False:
            stated.setdefault("unsigned", False)
        fields.update(stated)
    return Format(**fields)


def resolve_format(slot: Slot, stated: Format) -> QuantFormat:
    """The complete format of a slot: what was stated over the slot's defaults. Bits must be a number."""
    full = overlay([SLOT_DEFAULTS[slot], stated])
    assert isinstance(full.bits, int)
    assert full.quantizer is not None
    assert full.init is not None
    return QuantFormat(
        bits=full.bits,
        symmetric=bool(full.symmetric),
        unsigned=bool(full.unsigned),
        per=str(full.per),
        quantizer=full.quantizer.name,
        quantizer_options=dict(full.quantizer.options),
        init=full.init.name,
        init_options=dict(full.init.options),
        align=bool(full.align),
        balance=bool(full.balance),
        mid_rise=bool(full.mid_rise),
    )
