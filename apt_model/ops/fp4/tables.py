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

    @property
    def warps(self) -> int:
        """Of a program."""
        return 4 * self.wg // self.rep


class Tile(NamedTuple):
    """A launch of `kernel_tile`: weights and x come through shared memory, `c` chunks a step in `stages`."""

    wg: int
    bm: int
    c: int
    stages: int
    split: int

    @property
    def warps(self) -> int:
        """Of a program."""
        return 4 * self.wg


# Outputs, inputs, most rows of x -> launch. Torch 2.11, triton 3.6; benchmarks/fp4/tune.py.
Table = dict[tuple[int, int, int], Decode | Tile]
H100: Table = {
    (4096, 4096, 8): Decode(1, 8, 2, 4, 8),
    (4096, 4096, 16): Tile(1, 16, 8, 3, 3),
    (4096, 4096, 64): Tile(1, 64, 4, 3, 2),
    (4096, 4096, 256): Tile(1, 128, 4, 3, 1),
    (4096, 4096, 1024): Tile(2, 256, 2, 3, 1),
    (8192, 8192, 8): Tile(1, 8, 4, 4, 4),
    (8192, 8192, 16): Tile(1, 16, 4, 3, 4),
    (8192, 8192, 64): Tile(1, 64, 2, 4, 2),
    (8192, 8192, 256): Tile(2, 128, 2, 3, 1),
    (8192, 8192, 1024): Tile(2, 256, 2, 3, 1),
    (14336, 4096, 8): Tile(1, 8, 8, 3, 1),
    (14336, 4096, 16): Tile(1, 16, 8, 3, 1),
    (14336, 4096, 64): Tile(2, 64, 4, 3, 1),
    (14336, 4096, 256): Tile(2, 256, 2, 3, 1),
    (14336, 4096, 1024): Tile(2, 256, 2, 3, 1),
    (28672, 8192, 8): Tile(4, 8, 4, 3, 1),
    (28672, 8192, 16): Tile(2, 16, 8, 2, 1),
    (28672, 8192, 64): Tile(2, 64, 4, 2, 1),
    (28672, 8192, 256): Tile(2, 256, 2, 3, 1),
    (28672, 8192, 1024): Tile(2, 256, 2, 3, 1),
}

# The same multiprocessors and more bandwidth: few rows are bound by instructions, where an H100 waits for memory.
H200: Table = H100 | {
    (768, 768, 8): Decode(2, 8, 1, 4, 3),
    (768, 768, 16): Tile(1, 16, 4, 2, 3),
    (768, 768, 64): Tile(1, 64, 2, 3, 3),
    (768, 768, 128): Tile(1, 128, 2, 4, 2),
    (768, 3072, 8): Tile(1, 8, 8, 3, 3),
    (768, 3072, 16): Tile(1, 16, 8, 3, 3),
    (768, 3072, 64): Tile(1, 64, 4, 3, 3),
    (768, 3072, 128): Tile(1, 128, 4, 3, 3),
    (3072, 768, 8): Decode(1, 8, 2, 4, 2),
    (3072, 768, 16): Tile(1, 16, 4, 3, 2),
    (3072, 768, 64): Tile(1, 64, 4, 3, 2),
    (3072, 768, 128): Tile(1, 128, 2, 4, 2),
    (3072, 768, 1024): Tile(1, 128, 2, 2, 1),
    (4096, 4096, 16): Tile(1, 16, 8, 3, 4),
    (4096, 4096, 64): Tile(1, 64, 8, 2, 2),
    (8192, 8192, 8): Decode(2, 8, 4, 4, 8),
    (8192, 8192, 64): Tile(1, 64, 2, 3, 3),
    (14336, 4096, 8): Decode(2, 8, 4, 4, 4),
    (14336, 4096, 64): Tile(2, 64, 8, 2, 1),
    (28672, 8192, 8): Decode(2, 8, 8, 8, 6),
}


def of_card(name: str) -> Table:
    """The table for a GPU of compute capability 9.0, by what its driver calls it."""
    return H200 if "H200" in name else H100
