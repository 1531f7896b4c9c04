"""What qdetr supports of each family, from the rows that decide it: for `qdetr plugins` and the README."""

from dataclasses import dataclass, fields

from qdetr_cli import plugins
from qdetr_cli.families import Family
from qdetr_cli.original import layouts

HEADINGS = ("family", "attention", "classes", "images", "backbone", "fine-tunes", "original files")


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """One family in words. All are inspected, quantized, measured and used; not all have a loss."""

    family: str
    attention: str  # the kinds that are quantized
    classes: str
    images: str  # unless the checkpoint says otherwise
    backbone: str
    finetunes: str
    originals: str  # repositories whose files are read

    def cells(self) -> dict[str, str]:
        """Heading -> text."""
        return dict(zip(HEADINGS, (getattr(self, field.name) for field in fields(self)), strict=True))


def supported() -> tuple[Support, ...]:
    """A row for every registered family, in the order of registration: plugins come last."""
    registered = [entry for entry in plugins.entries() if entry.kind == "family"]
    return tuple(
        support_of(entry.object) for entry in sorted(registered, key=lambda e: e.origin != "built-in")
    )


def support_of(family: Family) -> Support:
    """The row of one family."""
    kinds = {"dense": family.attention, "deformable": family.deformable}
    return Support(
        family=family.name,
        attention=" and ".join(kind for kind, classes in kinds.items() if classes),
        classes='softmax, and "no object"' if family.softmax else "sigmoid",
        images=_images(family),
        backbone="its own" if family.own_backbone else "any",
        finetunes="yes" if family.trainable else "no: no loss",
        originals=", ".join(each.repository for each in layouts() if family.name in each.families) or "-",
    )


def markdown() -> str:
    """The table of the README: what is built in."""
    built_in = {entry.name for entry in plugins.entries() if entry.origin == "built-in"}
    rows = [tuple(row.cells().values()) for row in supported() if row.family in built_in]
    lines = [HEADINGS, ("---",) * len(HEADINGS), *((f"`{name}`", *rest) for name, *rest in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _images(family: Family) -> str:
    pixels, step = family.processor, family.divisible(family.kind.config_class())
    if pixels.size is not None:
        size = f"{pixels.size[0]}x{pixels.size[1]}"
    else:
        size = f"shortest side {pixels.shortest}, longest {pixels.longest}"
    return f"{size}, multiples of {step}" if step > 1 else size
