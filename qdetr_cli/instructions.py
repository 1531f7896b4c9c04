"""What a processor computes with integers: which files are exact on it depends on that."""

from pathlib import Path

SAFE_BITS = 7  # bits of weights, of which 16 bits always hold two products with uint8
_INTEGER = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_WHOLE = {"avx512_vnni", "avx_vnni", "amx_int8"}  # of x86: products of bytes are added in 32 bits


def instructions() -> tuple[str, ...]:
    """The instruction sets for integers, as Linux calls them; none where it cannot be known."""
    info = cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(flag for flag in _INTEGER if flag in flags)


def sums_overflow() -> bool:
    """Whether runtimes add two products of uint8 and int8 in 16 bits, and cut what does not fit.

    So do x86 processors without VNNI (AMD before Zen 4, Intel before Ice Lake and Cascade Lake), and
    2 * 255 * 127 > 32767.
    False where the processor cannot be known.
    """
    found = set(instructions())
    return "avx2" in found and not found & _WHOLE


def cpuinfo() -> dict[str, str]:
    """The first core's lines of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
