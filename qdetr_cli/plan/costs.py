"""The published rule for counting low-bit operations."""

_PUBLISHED = {2: 1 / 32, 3: 1 / 16, 4: 1 / 8}  # Q-DETR: share of a real-valued multiplication
_REST = 1 / 4  # 5 to 8 bits: not in the paper; the ratio of a byte to a float


def published_share(bits: int) -> float:
    """What a multiplication counts by the paper's rule; `bits` is the wider side, 32 for float."""
    return _PUBLISHED.get(bits, _REST if bits <= 8 else 1.0)
