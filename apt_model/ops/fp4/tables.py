"""Settings of the launches, and those that were measured best."""

from typing import NamedTuple


class Decode(NamedTuple):
    """A launch of `kernel_decode`: every warp reads its own weights, x is at most `bm` rows."""

    wg: int
    bm: int
    kept: int  # groups of x's slice in shared memory; 0: read from memory
    ahead: int
    split: int
    rep: int = 1  # tiles of 64 rows that four warps hold, so that a fragment of x serves more weights


class Tile(NamedTuple):
    """A launch of `kernel_tile`: x comes through shared memory, `c` chunks a step in `stages`."""

    wg: int
    bm: int
    c: int
    stages: int
    ahead: int
    split: int


# Outputs, inputs, most rows of x -> launch. NVIDIA H200, torch 2.11, triton 3.6; benchmarks/fp4/tune.py.
HOPPER: dict[tuple[int, int, int], Decode | Tile] = {
    (4096, 4096, 8): Decode(2, 8, 1, 4, 16, 2),
    (4096, 4096, 16): Decode(1, 16, 2, 8, 8),
    (4096, 4096, 64): Tile(1, 64, 4, 3, 5, 4),
    (4096, 4096, 256): Tile(2, 128, 4, 3, 5, 2),
    (4096, 4096, 1024): Tile(2, 256, 2, 3, 4, 1),
    (8192, 8192, 8): Decode(2, 8, 4, 4, 8),
    (8192, 8192, 16): Decode(2, 16, 8, 8, 4),
    (8192, 8192, 64): Tile(1, 64, 4, 3, 5, 2),
    (8192, 8192, 256): Tile(2, 128, 4, 3, 5, 1),
    (8192, 8192, 1024): Tile(2, 256, 2, 3, 4, 1),
    (14336, 4096, 8): Decode(2, 8, 4, 4, 6, 2),
    (14336, 4096, 16): Decode(2, 16, 4, 4, 4, 2),
    (14336, 4096, 64): Tile(1, 64, 4, 3, 5, 1),
    (14336, 4096, 256): Tile(2, 256, 2, 3, 4, 1),
    (14336, 4096, 1024): Tile(2, 256, 2, 3, 4, 1),
    (28672, 8192, 8): Decode(2, 8, 8, 8, 6),
    (28672, 8192, 16): Tile(2, 16, 4, 3, 5, 1),
    (28672, 8192, 64): Tile(2, 64, 4, 3, 5, 1),
    (28672, 8192, 256): Tile(2, 256, 2, 3, 4, 1),
    (28672, 8192, 1024): Tile(2, 256, 2, 3, 4, 1),
}
