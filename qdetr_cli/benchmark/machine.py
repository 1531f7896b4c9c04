"""What a measurement ran on."""

import os
import platform
from pathlib import Path
from typing import Any

from qdetr_cli.sessions import cores

INTEGER_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
BUSY = 0.5  # load per core from which times cannot be trusted


def machine() -> dict[str, Any]:
    """The CPU, its instructions for integers, the cores that may be used, and how busy they are now."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in INTEGER_FLAGS if flag in flags],
        "cores": cores(),
        "load": None if load is None else round(load, 2),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def is_busy(found: dict[str, Any]) -> bool:
    """True where others use the cores: times are then too long, while ratios of turns still say something."""
    return found["load"] is not None and found["load"] > BUSY * found["cores"]


def _cpuinfo() -> dict[str, str]:
    """The first core's lines of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
