"""Causal attention as the models compute it, beside the same with its matrix of scores written out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from apt_model.optimization.bench.rows import (
    MEMORY,
    Course,
    Row,
    beside_peer,
    checked,
    failed,
    limit_of,
    product_name,
    ratio,
    squares,
)

# Queries of one head that are compared at a time.
_PIECE = 1024


def attention_rows(
    course: Course, length: int, heads: tuple[int, int], dtype: torch.dtype, room: int
) -> Iterator[Row]:  # fmt: skip
    """Two rows: torch's scaled_dot_product_attention, and scores, softmax and product one by one.

    Operations are those below the diagonal, bytes those of queries, keys, values and result, for both.

    Args:
        course: what the benchmark goes by.
        length: positions of queries and keys.
        heads: how many, and their width.
        dtype: of all tensors.
        room: bytes that the scores may take.
    """
    count, width = heads
    shape = (1, count, length, width)
    work = {
        MEMORY: 4.0 * math.prod(shape) * dtype.itemsize,
        product_name(dtype): 2.0 * count * width * length * (length + 1),
    }
    rows = {what: Row(part="attention", what=what, shape=_by(shape), rows=length, work=work) for what in _WAYS}
    try:
        qkv = [torch.randn(*shape, device=course.watch.device.device).to(dtype) for _ in range(3)]
    except Exception as problem:  # noqa: BLE001 - memory: the rows say so
        yield from (failed(row, problem) for row in rows.values())
        return
    need = count * length**2 * (3 * dtype.itemsize + 1)
    found = []
    for what, row in rows.items():
        course.told(f"attention, {length} positions, {what}")
        if _WAYS[what] is written_out and need > room:
            why = f"the scores would take {need / 1e9:.1f} GB, and {room / 1e9:.1f} may be used"
            found.append(dataclasses.replace(row, why=why))
            continue
        call = functools.partial(_WAYS[what], *qkv)
        error = functools.partial(_error_of_call, call, qkv)
        found.append(checked(row, error, limit_of(dtype), functools.partial(course.watch.gpu, [call])))
    yield beside_peer(found[0], found[1])
    yield found[1]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _error_of_call(call: Callable[[], Tensor], qkv: Sequence[Tensor]) -> float:
    return error_of(call(), *qkv)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, H, T, d] -> [B, H, T, d], as `layers/attention.py` asks for it where there is no padding."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, by way of scores [B, H, T, T]."""
    length = q.shape[-2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill_(later, -torch.inf).softmax(-1) @ v


def error_of(got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of a result from the definition in fp32, some queries of a head at a time."""
    differing = expected = 0.0
    position = torch.arange(q.shape[-2], device=q.device)
    for head in range(q.shape[1]):
        keys, values = k[0, head].float(), v[0, head].float()
        for begin in range(0, len(keys), _PIECE):
            here = slice(begin, begin + _PIECE)
            scores = q[0, head, here].float() @ keys.T / math.sqrt(q.shape[-1])
            scores.masked_fill_(position[None, :] > position[here, None], -torch.inf)
            pair = squares(got[0, head, here], scores.softmax(-1) @ values)
            differing, expected = differing + pair[0], expected + pair[1]
    return ratio(differing, expected)


_WAYS = {"SDPA": fused, "scores written out": written_out}
