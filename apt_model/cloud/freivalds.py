"""Freivalds' check of a product computed elsewhere: random numbers fold it, and the fold is compared with the weights'.

For y = x W^T + b and random r, a sign and a length each, y . r must be x . (W^T r) + b . r: `in + out` multiplications
a token instead of `in * out`. Outputs are folded some at a time, 64 in 16 bits and 256 in fp32, which costs that part
of the product: so that one wrong element stands out of the rounding of few others. The numbers are this process's
secret. (R. Freivalds, "Probabilistic machines can use less running time", IFIP 1977.)

What rounding may do follows in part from the answer, so that an answer which is wrong by a factor allows itself more:
no element may be larger than |x| |w| + |b|.

One fold lets an error of many elements pass where its sum happens to be near 0: about once in a hundred for an input of
which a bit came wrong, at 100 times what rounding may do. So there are several folds, each with numbers of its own.
"""

import functools
import secrets

import torch
from torch import Tensor

from apt_model.cloud.int8g64 import GROUP
from apt_model.core.errors import IntegrityError

_SIGMAS = 7.0
# Rounding an answer to its type, relative, twice over: a server may add partial sums in it.
_ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
_ACCUMULATION = 2.0**-22  # of products added in fp32, relative to |x| |w|
_INT8_STEP = 1 / 127
# Of |x| |w| + |b|, which no element of a product exceeds: rounding to 8 bits and the like included.
_LARGEST = 1.05
REPEATS, INT8_REPEATS = 3, 4
"""Independent folds, and those of answers in 8 bits: one alone misses a doubled scale in about six of a hundred."""


class Freivalds:
    """Checks answers for one weight.

    Args:
        weight: [out, in].
        bias: [out], or None.
        fold: outputs a fold; None is what the type wants.
        repeats: folds with numbers of their own.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, fold: int | None = None, repeats: int = REPEATS
    ) -> None:
        out, is_wide = weight.shape[0], weight.dtype == torch.float32
        fold = fold or min(256 if is_wide else 64, max(out, 1))
        # Beside 16 bits fp32 is exact enough; beside fp32 it is not.
        self._dtype = torch.float64 if is_wide else torch.float32
        weight = weight.detach().cpu().double()
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        self._short = -out % fold
        self._fold = fold
        signs = torch.randint(0, 2, (repeats, out), generator=generator).double().mul_(2).sub_(1)
        # Of lengths 3/4 to 5/4: signs alone cancel each other where every element is off by the same. With 8 bits each,
        # so that products with values of 16 bits are exact.
        lengths = torch.rand(repeats, out, generator=generator, dtype=torch.float64) / 2 + 0.75
        signs *= lengths.float().double() if is_wide else (lengths * 128).round_() / 128
        self._numbers = self._grouped(signs).to(self._dtype).permute(1, 2, 0).contiguous()  # [folds, fold, repeats]
        self._folded = self._sum(weight.T, signs)  # [in, folds * repeats]
        lengths = torch.linalg.vector_norm(weight, dim=1)
        self._most = lengths.float() * _LARGEST
        self._length = torch.linalg.vector_norm(self._grouped(lengths), dim=-1).to(self._dtype)  # [folds]
        bias = torch.zeros(out, dtype=torch.float64) if bias is None else bias.detach().cpu().double()
        self._most_bias = bias.abs().float() * _LARGEST
        self._bias = self._sum(bias, signs)
        self._bias_length = torch.linalg.vector_norm(self._grouped(bias), dim=-1).to(self._dtype)

    def wrong(self, x: Tensor, y: Tensor, *, int8: bool = False) -> Tensor:
        """Which tokens of y [tokens, out] are not x [tokens, in]'s product: bool [tokens].

        A token whose x is not finite is not judged; one whose y alone is not finite is wrong. `int8`: y came in
        int8g64, and x is what the server read.
        """
        if not torch.is_autocast_enabled("cpu"):
            return self._wrong(x, y, int8=int8)
        with torch.autocast("cpu", enabled=False):  # its sums are in types of their own
            return self._wrong(x, y, int8=int8)

    def _wrong(self, x: Tensor, y: Tensor, *, int8: bool) -> Tensor:
        wide, exact = y.float(), x.to(self._dtype)
        found = self._grouped(wide)
        off = torch.addmm(self._bias, exact, self._folded).sub_(self._folds_of(found.to(self._dtype))).abs_()
        off = off.view(len(off), -1, self._numbers.shape[-1]).amax(-1)
        lengths = torch.linalg.vector_norm(found, dim=-1)
        width = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        # Variances of what rounding does, in each fold.
        least, rounding = _least(y.dtype), _ROUNDING[y.dtype] ** 2 / 3
        allowed = (width * self._length).add_(self._bias_length).mul_(_ACCUMULATION).square_()
        allowed = allowed.add_(lengths.square(), alpha=rounding).add_(self._fold * least**2)
        if int8:
            allowed += self._int8_variance(wide)
        good = (off <= allowed.sqrt_().mul_(_SIGMAS)).logical_and_(lengths.isfinite()).all(-1)
        most = torch.addcmul(self._most_bias + least, width.float(), self._most)
        bad = (wide.abs() > most).any(-1).logical_or_(~good)
        return bad.logical_and_(width[:, 0].isfinite())

    def _folds_of(self, found: Tensor) -> Tensor:
        """[tokens, folds, fold], each fold times its numbers: [tokens, folds * repeats]."""
        if found.shape[1] == 1:
            return found[:, 0] @ self._numbers[0]
        return torch.bmm(found.transpose(0, 1), self._numbers).transpose(0, 1).flatten(1)

    def _sum(self, values: Tensor, signs: Tensor) -> Tensor:
        """[..., out] in doubles, folded: [..., folds * repeats]."""
        each = [self._grouped(values * numbers).sum(-1) for numbers in signs]
        return torch.stack(each, -1).flatten(-2).to(self._dtype)

    def check(self, x: Tensor, y: Tensor, who: str, *, int8: bool = False) -> None:
        """`IntegrityError` where a token is wrong."""
        bad = self.wrong(x, y, int8=int8)
        if bool(bad.any()):
            raise IntegrityError(
                f"{who}: {int(bad.sum())} of {len(bad)} tokens are not the local weights' product; not used",
                remedy="push the weights again; if it stays so, the server computes something else: do not use it",
            )

    def _int8_variance(self, y: Tensor) -> Tensor:
        steps = torch.nn.functional.pad(y, (0, -y.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)).abs().amax(-1)
        each = (steps * _INT8_STEP).square_().div_(12).repeat_interleave(GROUP, dim=-1)[..., : y.shape[-1]]
        return self._grouped(each).sum(-1)

    def _grouped(self, values: Tensor) -> Tensor:
        """[..., out] as [..., folds, fold], with zeros after the last."""
        if self._short:
            values = torch.nn.functional.pad(values, (0, self._short))
        return values.view(*values.shape[:-1], -1, self._fold)


@functools.cache
def _least(dtype: torch.dtype) -> float:
    """What an answer of next to nothing is rounded by."""
    about = torch.finfo(dtype)
    return about.tiny * about.eps
