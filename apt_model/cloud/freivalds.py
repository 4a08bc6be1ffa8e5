"""Freivalds' check of a product computed elsewhere: random numbers fold it, and the fold is compared with the weights'.

For y = x W^T + b and random r, a sign and a length each, y . r must be x . (W^T r) + b . r: `in + out` multiplications
a token instead of `in * out`. Outputs are folded some at a time, 64 in 16 bits and 256 in fp32: so that one wrong
element stands out of the rounding of few others. The numbers are this process's secret. (R. Freivalds, "Probabilistic
machines can use less running time", IFIP 1977.)

What rounding may do follows in part from the answer, so that an answer which is wrong by a factor allows itself more:
no element may be larger than |x| |w| + |b|.

One fold lets an error of many elements pass where its sum happens to be near 0: about once in a hundred for an input of
which a bit came wrong, at 100 times what rounding may do. So there are several folds, each with numbers of its own.

Folding for all of these costs more than a tenth of the product, and a verdict is given on suspects alone. What a fold
is allowed leaves room for any server: nearly twenty standard deviations of what rounding an answer once does. So up to
eight folds are summed, with three of the verdict's repeats: what is wrong in one of them stands out of the rounding of
all eight as well. A token is suspect where such a sum is off by more than a part of what each of its folds is allowed.
A right one that is suspect costs time and nothing else. Answers in 8 bits are rounded by nearly what they are allowed:
all their tokens get a verdict.
"""

import functools
import math
import secrets
from typing import NamedTuple

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
_SUMMED = 8  # folds that are looked at together
# Of what one of them is allowed, that makes a token suspect. The rest is for the rounding of the seven others, which
# may hide an error as well as look like one.
_SUSPECT = {torch.float16: 0.6, torch.bfloat16: 0.6, torch.float32: 0.5}
_SUSPECT_REPEATS = 3
_FAR = 1e30  # sums of such numbers may leave fp32
_AT_ONCE = 2**19  # values of x or y: memory taken anew costs more than what is computed in it
REPEATS = INT8_REPEATS = 4
"""Independent folds: one alone misses a doubled scale of an answer in 8 bits in about six of a hundred."""


class Freivalds:
    """Checks answers for one weight.

    Args:
        weight: [out, in].
        bias: [out], or None.
        fold: outputs a fold, a multiple of 64 or all of them; None is what the type wants.
        repeats: folds with numbers of their own.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, fold: int | None = None, repeats: int = REPEATS
    ) -> None:
        out, self._type = weight.shape[0], weight.dtype
        is_wide = self._type == torch.float32
        self._fold = fold = fold or min(256 if is_wide else 64, max(out, 1))
        # Beside 16 bits fp32 is exact enough; beside fp32 it is not.
        self._dtype = torch.float64 if is_wide else torch.float32
        weight = weight.detach().cpu().double()
        bias = torch.zeros(out, dtype=torch.float64) if bias is None else bias.detach().cpu().double()
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        signs = torch.randint(0, 2, (repeats, out), generator=generator).double().mul_(2).sub_(1)
        # Of lengths 3/4 to 5/4: signs alone cancel each other where every element is off by the same. With 8 bits each,
        # so that products with values of 16 bits are exact.
        lengths = torch.rand(repeats, out, generator=generator, dtype=torch.float64) / 2 + 0.75
        signs *= lengths.float().double() if is_wide else (lengths * 128).round_() / 128
        lengths = torch.linalg.vector_norm(weight, dim=1)
        self._most = lengths.float() * _LARGEST
        self._most_bias = bias.abs().float() * _LARGEST
        # Where the largest of a group is below these, all of it is.
        self._least_most, self._least_most_bias = (
            _grouped(each, GROUP, math.inf).amin(-1) for each in (self._most, self._most_bias)
        )
        # Variances of the outputs in a group, in steps.
        self._counts = _grouped(torch.ones(out), GROUP).sum(-1) / 12
        numbers = _grouped(signs, fold).transpose(0, 1).contiguous()
        sums = _Sums(
            numbers, _folds_of(numbers, weight.T), _folds_of(numbers, bias[None])[:, :, 0],
            *(torch.linalg.vector_norm(_grouped(each, fold), dim=-1) for each in (lengths, bias)),
        )  # fmt: skip
        self._sums = {self._dtype: sums.to(self._dtype)}
        self._suspicion = _Suspicion(sums, self._type)

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
        if int8 or y.dtype != self._type:
            parts = zip(*(each.split(_rows(x, y)) for each in (x, y)), strict=True)
            return torch.cat([self._verdict(*each, int8=int8) for each in parts])
        bad = self._suspicion.of(x, y)
        if bool(bad.any()):
            suspects = bad.nonzero()[:, 0]
            parts = zip(*(each[suspects].split(_rows(x, y)) for each in (x, y)), strict=True)
            bad[suspects] = torch.cat([self._verdict(*each, int8=False) for each in parts])
        return bad

    def _verdict(self, x: Tensor, y: Tensor, *, int8: bool) -> Tensor:
        # Beside what 8 bits round, fp32 is exact enough as well; squares of large and small numbers leave its range.
        dtype, measured = (torch.float32, torch.float32) if int8 else (self._dtype, torch.float64)
        if not int8 and bool((x.abs() > _FAR).any()):
            dtype = torch.float64
        if dtype not in self._sums:
            self._sums[dtype] = self._sums[self._dtype].to(dtype)
        sums = self._sums[dtype]
        wide, exact = y.float(), x.to(dtype)
        found = _grouped(wide, self._fold)
        off = sums.off(exact, found.to(dtype)).abs_().amax(-1)
        lengths = torch.linalg.vector_norm(found, dim=-1, dtype=measured)
        width = torch.linalg.vector_norm(exact, dim=-1, keepdim=True, dtype=measured)
        # Variances of what rounding does, in each fold.
        least, rounding = _least(y.dtype), _ROUNDING[y.dtype] ** 2 / 3
        allowed = (width * sums.length).add_(sums.bias_length).mul_(_ACCUMULATION).square_()
        allowed = allowed.add_(lengths.square(), alpha=rounding).add_(self._fold * least**2)
        largest = _grouped(wide.abs(), GROUP).amax(-1)
        if int8:
            variances = (largest * _INT8_STEP).square_().mul_(self._counts)
            allowed += _grouped(variances, -(-self._fold // GROUP)).sum(-1)
        good = (off <= allowed.sqrt_().mul_(_SIGMAS)).logical_and_(lengths.isfinite()).all(-1)
        if bool((largest > width * self._least_most + self._least_most_bias).any()):
            most = width * self._most + (self._most_bias + least)
            if int8:  # half a step is more than next to nothing beside a large output
                most += (largest * (_LARGEST / 2 * _INT8_STEP)).repeat_interleave(GROUP, dim=-1)[:, : most.shape[1]]
            good &= (wide.abs() <= most).all(-1)
        return good.logical_not_().logical_and_(width[:, 0].isfinite())

    def check(self, x: Tensor, y: Tensor, who: str, *, int8: bool = False) -> None:
        """`IntegrityError` where a token is wrong."""
        bad = self.wrong(x, y, int8=int8)
        if bool(bad.any()):
            raise IntegrityError(
                f"{who}: {int(bad.sum())} of {len(bad)} tokens are not the local weights' product; not used",
                remedy="push the weights again; if it stays so, the server computes something else: do not use it",
            )


_rooms: list[Tensor] = []
"""For values in fp32, 4 MiB each: as many as were ever in use at once. Pages taken anew cost more than the sums."""


class _Sums(NamedTuple):
    """What folds of right products are computed from."""

    numbers: Tensor  # [folds, repeats, fold]
    folded: Tensor  # the weights: [folds, repeats, in]
    bias: Tensor  # [folds, repeats]
    length: Tensor  # of all of a fold's weights: [folds]
    bias_length: Tensor

    def to(self, dtype: torch.dtype) -> "_Sums":
        """In the type that sums are computed in."""
        return _Sums(*(each.to(dtype).contiguous() for each in self))

    def off(self, x: Tensor, found: Tensor) -> Tensor:
        """Folds of the product less those of what was found [tokens, folds, fold]: [tokens, folds, repeats]."""
        folds, repeats, fold = self.numbers.shape
        right = torch.addmm(self.bias.flatten(), x, self.folded.flatten(0, 1).T)
        if folds == 1:
            return right.addmm_(found.view(len(x), fold), self.numbers[0].T, alpha=-1)[:, None]
        right = right.view(len(x), folds, repeats).permute(1, 2, 0)
        # As the left factor the numbers, which are few: four times as fast as the other way round.
        return torch.baddbmm(right, self.numbers, found.permute(1, 2, 0), alpha=-1).permute(2, 0, 1)


class _Suspicion:
    """Sums of several folds, in fp32: which tokens need a verdict."""

    def __init__(self, sums: _Sums, dtype: torch.dtype) -> None:
        folds, _, self._fold = sums.numbers.shape
        # At least two sums of each repeat, where there are two folds.
        self._summed = summed = min(_SUMMED, max(-(-folds // 2), 1))
        self._is_wide = dtype == torch.float32
        # Each fold is scaled, by a power of two, so that the same is allowed to all, as far as the weights tell.
        size = torch.where(sums.length > 0, sums.length, torch.where(sums.bias_length > 0, sums.bias_length, 1.0))
        scale = torch.exp2(-size.log2().round_().clamp_(-100, 100))
        numbers, folded, bias = (
            _grouped((each[:, :_SUSPECT_REPEATS].movedim(0, -1) * scale), summed) for each in sums[:3]
        )  # [repeats, ..., groups, summed]
        length, bias_length = (_grouped(each * scale, summed, math.inf).amin(-1) for each in sums[3:])
        numbers = numbers.permute(2, 0, 3, 1).flatten(2)  # [groups, repeats, summed * fold]
        folded, bias = (each.sum(-1).movedim(-1, 0) for each in (folded, bias))
        self._sums = _Sums(numbers, folded, bias, length, bias_length).to(torch.float32)
        part = _SIGMAS * _SUSPECT[dtype]
        self._length = (part * _ACCUMULATION * length).float()  # [groups]
        self._bias_length = (part * _ACCUMULATION * bias_length).float()
        # In 16 bits: times a fold's length, and what is added to that. A fold that fills a group up allows anything.
        self._scale = _grouped(part * _ROUNDING[dtype] / 3**0.5 * scale, summed, 1.0).float()
        least = torch.full_like(scale, (3 * self._fold) ** 0.5 * _least(dtype) / _ROUNDING[dtype])
        self._least = _grouped(least, summed, math.inf).float()

    def of(self, x: Tensor, y: Tensor) -> Tensor:
        """Which tokens are suspect: bool [tokens]. So are those whose sums or squares leave fp32."""
        found = (len(y), len(self._length) * self._summed * self._fold)
        rows = _rows(x, y)
        if len(x) <= rows or (self._is_wide and y.shape == found):
            return self._some(x.float(), _padded(y.float(), found[1]))
        need = rows * max(x.shape[1], found[1])
        try:
            room = _rooms.pop()
        except IndexError:
            room = _room(0)
        if room.shape[1] < need:
            room = _room(need)
        parts = zip(x.split(rows), y.split(rows), strict=True)
        bad = [self._some(_put(x, x.shape[1], room[0]), _put(y, found[1], room[1])) for x, y in parts]
        _rooms.append(room)
        return torch.cat(bad)

    def _some(self, x: Tensor, y: Tensor) -> Tensor:
        groups = len(self._length)
        off = self._sums.off(x, y.view(len(y), groups, self._summed * self._fold)).abs_()
        if self._is_wide:
            width = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            allowed = torch.addcmul(self._bias_length, width, self._length)
        else:
            lengths = torch.linalg.vector_norm(y.view(len(y), groups, self._summed, self._fold), dim=-1)
            allowed = lengths.hypot_(self._least).mul_(self._scale).amin(-1)
        allowed = allowed.nan_to_num_(nan=-1.0, posinf=-1.0)
        return (off <= allowed[:, :, None]).flatten(1).all(-1).logical_not_()


def _rows(x: Tensor, y: Tensor) -> int:
    """Tokens at once."""
    return max(_AT_ONCE // max(x.shape[1], y.shape[1], 1), 1)


def _room(need: int) -> Tensor:
    with torch.inference_mode(mode=False):  # else it may not be written to outside of that
        return torch.empty(2, need, dtype=torch.float32)


def _padded(values: Tensor, width: int) -> Tensor:
    short = width - values.shape[-1]
    return torch.nn.functional.pad(values, (0, short)) if short else values


def _put(values: Tensor, width: int, room: Tensor) -> Tensor:
    """As `_padded`, in fp32, into `room`."""
    tokens, own = values.shape
    put = room[: tokens * width].view(tokens, width)
    put[:, own:].zero_()
    put[:, :own].copy_(values.detach())
    return put


def _folds_of(numbers: Tensor, values: Tensor) -> Tensor:
    """Values [rows, out] in doubles, folded: [folds, repeats, rows]."""
    return torch.bmm(numbers, _grouped(values, numbers.shape[-1]).permute(1, 2, 0))


def _grouped(values: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """[..., width] as [..., groups, size], with `fill` after the last."""
    short = -values.shape[-1] % size
    if short:
        values = torch.nn.functional.pad(values, (0, short), value=fill)
    return values.view(*values.shape[:-1], values.shape[-1] // size, size)


@functools.cache
def _least(dtype: torch.dtype) -> float:
    """What an answer of next to nothing is rounded by."""
    about = torch.finfo(dtype)
    return about.tiny * about.eps
