"""A spot check of a block's answers: now and then one row, which nobody else can foresee, is computed here as well.

It is a sample, and no proof: what a server gets wrong always, or often, is found after some forwards, and what was used
until then stays used. `freivalds` checks every answer of a linear layer; a block that is not linear has no such check.
"""

import secrets

import torch
from torch import Tensor

from apt_model.core.errors import ConfigError, IntegrityError

APART = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.06}
"""How far a right row may be from the local one, relative to its length. 32 layers of Llama's shape, 512 wide, were off
from fp64 by 1e-6, 0.0023 and 0.019 at most; two devices that add in orders of their own differ by up to twice that."""
APART_INT8 = 0.1
"""The same for activations in 8 bits, of which the block here is given the unrounded ones."""


class SpotCheck:
    """Which rows are computed again, and whether they agree.

    Args:
        rate: the share of answers of which a row is computed again, from 0 to 1.
        int8: whether activations travel in 8 bits.

    Raises:
        ConfigError: another rate.
    """

    def __init__(self, rate: float, *, int8: bool = False) -> None:
        if not 0 <= rate <= 1:
            raise ConfigError(f"spot_check: expected a share from 0 to 1, got {rate!r}")
        self.rate = rate
        self._int8 = int8

    def row(self, rows: int) -> slice | None:
        """One of so many rows, or none this time; drawn from the system's secrets."""
        if not self.rate or secrets.randbelow(1 << 53) >= self.rate * (1 << 53):
            return None
        row = secrets.randbelow(rows)
        return slice(row, row + 1)

    def check(self, found: Tensor, expected: Tensor, who: str) -> None:
        """`IntegrityError` where a row is not the local one."""
        expected = expected.float()
        apart, length = float((found.float() - expected).norm()), float(expected.norm())
        allowed = APART_INT8 if self._int8 else APART[found.dtype]
        if not apart <= allowed * length + torch.finfo(found.dtype).tiny:
            raise IntegrityError(
                f"{who}: a row that was computed here too differs by {apart / max(length, 1e-30):.2g} of its length, "
                f"{allowed:g} is allowed; not used",
                remedy="if it stays so, the server computes something else: do not use it",
            )
