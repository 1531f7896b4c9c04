"""What a measurement ran on."""

import os
import platform
from typing import Any

from qdetr_cli.instructions import cpuinfo, instructions
from qdetr_cli.sessions import cores

BUSY = 0.5  # load per core from which times cannot be trusted


def machine() -> dict[str, Any]:
    """The CPU, its instructions for integers, the cores that may be used, and how busy they are now."""
    info = cpuinfo()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "instructions": list(instructions()),
        "cores": cores(),
        "load": None if load is None else round(load, 2),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def is_busy(found: dict[str, Any]) -> bool:
    """True where others use the cores: times are then too long, while ratios of turns still say something."""
    return found["load"] is not None and found["load"] > BUSY * found["cores"]
