"""Results as lines of a csv that grows: what is in it is not measured again."""

import csv
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """A csv with these columns, of which the first `keys` tell one measurement from another."""

    path: Path
    columns: tuple[str, ...]
    keys: int

    def lines(self) -> list[dict[str, str]]:
        """What has been measured."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def has(self, key: Sequence[str]) -> bool:
        """Whether a line begins so."""
        names = self.columns[: self.keys]
        return any([line[name] for name in names] == list(key) for line in self.lines())

    def add(self, line: Sequence[Any]) -> None:
        """Add a line, and the header to a new file; real numbers with four digits."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(self.columns)
            writer.writerow([round(each, 4) if isinstance(each, float) else each for each in line])


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
