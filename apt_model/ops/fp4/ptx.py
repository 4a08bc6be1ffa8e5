"""PTX that takes words of codes apart, as `layout.py` has solved them: written from its tables, for the kernels.

An assembly has its results as $0, $1, ...; then the word of codes, a word of two scales, and what else it takes.
"""

import torch

from apt_model.ops.fp4.layout import COPIES, PAIRS, PLACES

# The four pairs to eight halves of registers.
_HALVES = [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {name};" for i, name in enumerate("abcd")]


def decoding(dtype: torch.dtype) -> str:
    """Of one word, eight codes, four pairs of `dtype`, in eight halves of registers.

    The bits that are picked are the value times 2^-126 (fp16: 2^-14). Then times the scale, whose bits are s * 2^119
    (2^7); the product s * w * 2^-7 is exact. A multiplication alone needs compute capability 9.
    """
    return _assembly(dtype, 8, _HALVES)


def decoding_turned(dtype: torch.dtype) -> str:
    """`decoding`, and then each pair's 8 x 8 weights, which a warp holds, with rows for columns."""
    turn = [f"movmatrix.sync.aligned.m8n8.trans.b16 {name}, {name};" for name in "abcd"]
    return _assembly(dtype, 8, turn + _HALVES)


def unpacking(dtype: torch.dtype) -> str:
    """`decoding`, and then times the halves of a third word; each pair in one register."""
    return _assembly(dtype, 4, [f"mov.b32 ${i}, {name};" for i, name in enumerate("abcd")], 6)


def unpacking_to_e4m3(dtype: torch.dtype) -> str:
    """`unpacking`, rounded to E4M3: four pairs of bytes."""
    lines = []
    for i, name in enumerate("abcd"):
        if dtype == torch.float16:
            lines.append(f"cvt.rn.satfinite.e4m3x2.f16x2 ${i}, {name};")
        else:
            lines += [
                f"shl.b32 p, {name}, 16;",
                f"and.b32 q, {name}, 0xFFFF0000;",
                "mov.b32 f, p;",
                "mov.b32 e, q;",
                f"cvt.rn.satfinite.e4m3x2.f32 ${i}, e, f;",
            ]
    return _assembly(dtype, 4, lines, 6)


def _assembly(dtype: torch.dtype, results: int, last: list[str], factor: int | None = None) -> str:
    word, scale = f"${results}", f"${results + 1}"
    names, half = (word, "p", "q", "r", "v"), "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    mask = f"0x{sum(1 << place for place in PLACES[dtype]) * 0x10001:08X}"
    lines = []
    for name, (shift, *turned) in zip(names[1:], COPIES[dtype][1:], strict=True):
        kind = (
            f"shf.l.wrap.b32 {{}}, {word}, {word}, {{}};"
            if turned
            else f"shl.b32 {{}}, {word}, {{}};"
            if shift > 0
            else f"shr.u32 {{}}, {word}, {{}};"
        )
        lines.append(kind.format(name, abs(shift)))
    for name, copies in zip("abcd", PAIRS[dtype], strict=True):
        one, *other = (names[copy] for copy in copies)
        lines.append(
            f"lop3.b32 {name}, {one}, {other[0]}, {mask}, 0x28;" if other else f"and.b32 {name}, {one}, {mask};"
        )
    lines += [f"fma.rn.{half} {name}, {name}, {by}, z;" for name, by in zip("abcd", "ulul", strict=True)]
    if factor is not None:
        lines += [f"fma.rn.{half} {name}, {name}, ${factor}, z;" for name in "abcd"]
    return f"""
{{
.reg .b32 p, q, r, v, a, b, c, d, z, u, l;
.reg .f32 e, f;
.reg .b16 s, t;
mov.b32 z, 0x80008000;
mov.b32 {{s, t}}, {scale};
mov.b32 u, {{s, s}};
mov.b32 l, {{t, t}};
{chr(10).join([*lines, *last])}
}}
"""
