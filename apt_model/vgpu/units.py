"""Bytes: in pages, and as people read them. Pure."""

MB = 10**6
PAGE = 4096
"""Of memory, and what O_DIRECT wants of addresses, offsets and lengths on every disk in use."""


def padded(count: int, to: int = PAGE) -> int:
    """The next multiple of `to`."""
    return -(-count // to) * to


def shown(count: float) -> str:
    """In MB, as people read them."""
    return f"{count / MB:,.1f} MB"


def enough(count: int) -> str:
    """In MB, rounded up: what is named as enough is enough."""
    return f"{-(-count // 1000) / 1000:,.3f} MB"


def at_most(count: int) -> str:
    """In MB, rounded down: what is named as the most is not too much."""
    return f"{count // 1000 / 1000:,.3f} MB"
