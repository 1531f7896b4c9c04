"""The typed recipe. Defaults live here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qdetr_cli.recipe.formats import (
    GRANULARITIES,
    SLOTS,
    Format,
    Op,
    Option,
    Partial,
    Section,
    Slot,
    role_names,
)


def _listed(value: Any) -> Any:
    """A tuple: of the items of a list, or of one scalar."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else (value,)


Strings = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Ops = Annotated[tuple[Op, ...], BeforeValidator(_listed)]
Pair = Annotated[tuple[int, int], BeforeValidator(_listed)]
Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]


def _check_roles(roles: tuple[str, ...]) -> tuple[str, ...]:
    for role in roles:
        if role not in role_names():
            context = {"role": role, "valid": ", ".join(role_names())}
            raise PydanticCustomError("role", "{role} is not a role; roles: {valid}", context)
    return roles


# What `_fits` raises: a format that is fine, in the wrong slot.
SLOT_FAULTS = ("per", "weight", "align", "balance", "mid_rise")


def _fits(slot: Slot) -> Callable[[Format], Format]:
    """A check that a format can be used in this slot at all."""

    def check(stated: Format) -> Format:
        if stated.per is not None and stated.per not in GRANULARITIES[slot]:
            context = {"per": stated.per, "slot": slot, "valid": ", ".join(GRANULARITIES[slot])}
            raise PydanticCustomError("per", "per: {per} does not fit {slot}; valid: {valid}", context)
        if slot == "weight" and (stated.unsigned or stated.symmetric is False):
            raise PydanticCustomError("weight", "weights are signed and symmetric; drop the key")
        if stated.align and slot not in ("q", "k"):
            raise PydanticCustomError("align", "align: only q and k are aligned; drop the key")
        if stated.balance and slot != "q":
            raise PydanticCustomError("balance", "balance: k follows q; say it of q, and drop the key here")
        if stated.mid_rise and slot != "weight":
            raise PydanticCustomError("mid_rise", "mid_rise: only weights can do without a 0; drop the key")
        return stated

    return check


class Rule(Partial):
    """Which modules (selectors, and-ed) get which formats. Later rules win, slot by slot and field by field.

    `role` matches itself and its dotted children, `path` holds fnmatch patterns on in-memory module paths.
    `line` and `source` say where the rule is written; they are no part of its value.
    """

    role: Strings = ()
    path: Strings = ()
    op: Ops = ()
    weight: Annotated[Format, AfterValidator(_fits("weight"))] | None = None
    input: Annotated[Format, AfterValidator(_fits("input"))] | None = None
    q: Annotated[Format, AfterValidator(_fits("q"))] | None = None
    k: Annotated[Format, AfterValidator(_fits("k"))] | None = None
    probs: Annotated[Format, AfterValidator(_fits("probs"))] | None = None
    v: Annotated[Format, AfterValidator(_fits("v"))] | None = None
    output: Annotated[Format, AfterValidator(_fits("output"))] | None = None
    keep: Literal["float"] | None = None
    line: int = Field(default=0, exclude=True)
    source: str = Field(default="", exclude=True)

    _roles_exist = field_validator("role")(_check_roles)

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if not (self.role or self.path or self.op):
            raise PydanticCustomError("selector", "selects nothing; give role, path or op")
        if self.keep and self.slots():
            raise PydanticCustomError("keep", "keep: float leaves no slot to set; drop keep or the slots")
        if not self.keep and not self.slots():
            message = "sets nothing; give a slot (weight, input, q, k, probs, v, output) or keep: float"
            raise PydanticCustomError("empty", message)
        return self

    def slots(self) -> dict[Slot, Format]:
        """The slots that this rule sets, in their fixed order."""
        return {slot: value for slot in SLOTS if (value := getattr(self, slot)) is not None}

    @property
    def place(self) -> str:
        """Where the rule is written: `w4a4.yaml:12`, or only the source where it has no lines."""
        return f"{self.source}:{self.line}" if self.line else self.source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self.model_dump() == other.model_dump()


class Term(Section):
    """A loss term: its weight, and options of its own. Written `1.0` or `{weight: 2.5, tau: 0.6}`."""

    weight: NotNegative = 1.0
    options: dict[str, Option] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"weight": value}
        if isinstance(value, dict) and not isinstance(value.get("options"), dict):
            options = {key: option for key, option in value.items() if key != "weight"}
            return {**({"weight": value["weight"]} if "weight" in value else {}), "options": options}
        return value

    @model_serializer
    def _to_short(self) -> Any:
        return {"weight": self.weight, **self.options} if self.options else self.weight


Terms = dict[str, Term]


class Calibrate(Section):
    """How the first steps and offsets are found."""

    images: Count = 128
    batch_size: Count = 8
    seed: Whole = 0


class Augment(Section):
    """What happens to training images. `scales` are shortest sides, or squares where the family squashes."""

    flip: Fraction = 0.0
    scales: Annotated[tuple[Count, ...], BeforeValidator(_listed)] = ()
    crop: Fraction = 0.0
    color: NotNegative = 0.0


class Stage(Section):
    """A part of the training in which only some slots are quantized, up to the fraction `until` of its steps.

    `roles` and `slots` say which ones (empty: all). After the last stage everything is quantized.
    """

    until: Annotated[float, Field(strict=True, gt=0, lt=1)]
    roles: Strings = ()
    slots: Annotated[tuple[Slot, ...], BeforeValidator(_listed)] = ()

    _roles_exist = field_validator("roles")(_check_roles)


class Oscillation(Section):
    """Freezing of weights that flip between two grid numbers (Nagel et al. 2022, arXiv:2203.11086, alg. 1).

    A weight whose flips per step, averaged with `momentum`, exceed a threshold keeps its mean grid number for
    good. The threshold falls along a cosine from `start` to `end` between `after` (a fraction of the steps)
    and the last step. `bits`: only weights of this many bits or fewer.
    """

    bits: Annotated[int, Field(strict=True, ge=2, le=8)] = 3
    start: Fraction = 0.04
    end: Fraction = 0.01
    momentum: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.01
    after: Fraction = 0.0


class OneToMany(Section):
    """Auxiliary queries in training only: a second set, each object matched to `copies` of them.

    Their detection loss, times `weight`, is added.
    """

    copies: Count = 4
    weight: Positive = 1.0


class Train(Section):
    """Fine-tuning. `batch_size` is per process; `steps`, where given, ends training in place of `epochs`.

    `quantizer_lr` is relative: by what part of itself a step changes in one update of AdamW, at most.
    `compile` fuses fake quantization with torch.compile; `auto`: in trainings that are long enough to pay.
    `terms` are losses that need no teacher; `stages` quantize parts of the model later than others.
    A checkpoint to resume from is written at each evaluation, and `save_minutes` after the last one.
    """

    epochs: Positive = 12.0
    steps: Count | None = None
    batch_size: Count = 16
    accumulate: Count = 1
    lr: Positive = 1e-4
    backbone_lr: NotNegative = 1e-5
    quantizer_lr: NotNegative = 1e-3
    weight_decay: NotNegative = 1e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_steps: Whole = 0
    step_at: Fraction = 0.8
    clip: NotNegative = 0.1
    ema: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = 0.9998
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    compile: Annotated[bool, Field(strict=True)] | Literal["auto"] = "auto"
    batch_norm: Literal["frozen", "train"] = "frozen"
    freeze: Strings = ()
    workers: Whole = 2
    eval_every: Count = 1
    save_minutes: Positive | None = 15.0
    seed: Whole = 0
    augment: Augment = Augment()
    auxiliary: Flag = True
    terms: Terms = Field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    oscillation: Oscillation | None = None
    one_to_many: OneToMany | None = None

    @field_validator("stages")
    @classmethod
    def _stages_follow(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        ends = [stage.until for stage in stages]
        if any(later <= earlier for earlier, later in pairwise(ends)):
            raise PydanticCustomError("stages", "until must rise from stage to stage")
        return stages


class Distill(Section):
    """What the student learns from a teacher: `float` is the unquantized start, else a MODEL.

    `fade`: the weights of the terms fall linearly to nothing over this part of the training, so that a
    teacher that has been outgrown does not hold the student back (stopped early in Cho and Hariharan, 2019,
    arXiv:1910.01348); null: they stay as they are.
    """

    teacher: str | None = None
    terms: Terms = Field(default_factory=dict)
    fade: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _teaches(self) -> Distill:
        if self.teacher is not None and not self.terms:
            raise PydanticCustomError(
                "terms", "a teacher without terms teaches nothing; give terms, e.g. logits: 1.0"
            )
        if self.fade is not None and not self.terms:
            raise PydanticCustomError("fade", "fade: there are no terms that could fade; drop the key")
        return self


class Export(Section):
    """Where the integer model goes. `size` is (H, W).

    `portable` is for processors that add products of 8 bits in 16; None: for the one that exports.
    """

    to: Literal["onnx", "openvino"] = "onnx"
    size: Pair | None = None
    portable: bool | None = None


FIGURE_2_11: dict[str, tuple[str, ...]] = {
    "backbone": ("backbone", "input_proj"),
    "encoder": ("encoder",),
    "decoder attention": ("decoder.self_attention", "decoder.cross_attention", "sampling"),
    "MLPs": ("decoder.ffn", "decoder.other", "query", "class_head", "box_head"),
}


class Recipe(Section):
    """Everything that a run is told: rules first, then the stages in their order."""

    schema_version: Literal[1] = Field(alias="schema")
    extends: Strings = ()
    plugins: Strings = ()
    formats: dict[str, Format] = Field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    calibrate: Calibrate = Calibrate()
    train: Train = Train()
    distill: Distill = Distill()
    export: Export = Export()
    ladder: dict[str, Strings] = FIGURE_2_11

    @field_validator("ladder")
    @classmethod
    def _ladder_roles_exist(cls, ladder: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for roles in ladder.values():
            _check_roles(roles)
        return ladder

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values for a manifest; `recipe_from_dict` gives an equal recipe back."""
        return self.model_dump(mode="json", by_alias=True)
