"""What training adds to a linear over 4-bit weights, and what bias and activation add to its forward: GPU time.

    python benchmarks/fp4/gradient.py [--parts gradient epilogue] [--shapes 8192x8192 ...] [--ms 1 16 ...] [--rounds 7] [--small]

`gradient`: dX = dY W beside torch's product in bf16 and beside bitsandbytes' way, which is to dequantise the whole weight
first. Extra memory is the most that a call holds at once beside its operands and its result.
`epilogue`: a product alone, with a bias, and with each activation too, in one launch; beside bf16, where they are
operations of their own. As in `linear.py` calls are replayed from CUDA graphs over rotating copies, arms take turns, and
a result is compared with the definition first: a row whose numbers are wrong reports no speed.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from apt_model.ops import fp4
from apt_model.ops.fp4 import naive, select
from benchmarks import record
from benchmarks.fp4 import peers
from benchmarks.fp4.cells import (
    DEVICE,
    attempt,
    goals_note,
    in_processes,
    measure,
    ready_cells,
    reasons,
    summary,
    synchronize,
    table,
    weight_of,
)

SHAPES = {
    "gradient": ("28672x8192", "8192x8192", "14336x4096", "4096x4096"),
    "epilogue": ("8192x8192", "14336x4096"),
}
MS = {"gradient": (1, 16, 256, 2048, 4096, 8192), "epilogue": (1, 16, 64, 256, 1024, 4096)}
SMALL_SHAPES, SMALL_MS = ("96x80", "64x48"), (1, 5, 33)
# On an H200: speed of the gradient over bf16 from this many rows on; MiB beside operands and result; time over the
# product alone.
GOAL_SPEED, GOAL_FROM, GOAL_MIB, GOAL_EPILOGUE = 0.92, 2048, 32, 1.02
EPILOGUES = {"product": None, "bias": None} | {
    f"bias, {name}": name for name in ("relu", "gelu", "gelu_tanh", "silu", "swiglu")
}
# Of bf16, which takes as long for other activations.
DENSE_EPILOGUES = ("product", "bias", "bias, gelu", "bias, swiglu")


def dense_gradient(weight, limit=None):
    calls = [partial(torch.mm, mat2=each) for each in peers.dense_copies(weight, limit)]
    return _gradient(calls, weight, weight, weight.nbytes)


def our_gradient(weight, limit=None, *, form):
    packed, nbytes, _ = peers.packed_of(weight, form)
    calls = [partial(select.linear_gradient, weight=each) for each in peers.orders_of(packed, weight.dtype, limit)]
    return _gradient(calls, naive.dequantize(packed, torch.float32), weight, nbytes)


def bitsandbytes_gradient(weight, limit=None, *, kind):
    import bitsandbytes as bnb

    layers, values, nbytes = peers.bitsandbytes_layers(weight, limit, kind=kind)

    def of(layer):
        codes, state = layer.weight.data, layer.weight.quant_state
        return lambda dy: torch.mm(dy, bnb.functional.dequantize_4bit(codes, state).view(weight.shape).to(dy.dtype))

    return _gradient([of(layer) for layer in layers], values, weight, nbytes)


def _gradient(calls, values, weight, nbytes):
    exact = values.float()
    return peers.Operand(calls, lambda dy: dy.float() @ exact, nbytes, peers.relative_square(exact, weight))


GRADIENTS = {
    peers.BASE: dense_gradient,
    peers.OURS[0]: partial(our_gradient, form="nvfp4"),
    peers.OURS[1]: partial(our_gradient, form="mxfp4"),
    "bitsandbytes fp4": partial(bitsandbytes_gradient, kind="fp4"),
    "bitsandbytes nf4": partial(bitsandbytes_gradient, kind="nf4"),
}


def epilogues(weight, names, limit=None):
    """(arm, epilogue) -> operand; copies of the weight are shared by all that take it in one order."""
    packed, nbytes, error = peers.packed_of(weight, "nvfp4")
    torch.manual_seed(1)
    drawn = torch.randn(len(weight), device=weight.device).to(weight.dtype)
    orders = {
        gated: peers.orders_of(packed, weight.dtype, limit, gated=gated)
        for gated in {EPILOGUES[name] == "swiglu" for name in names}
    }
    copies, found = peers.dense_copies(weight, limit), {}
    for name in names:
        activation, bias = EPILOGUES[name], None if name == "product" else drawn
        options = {"bias": bias, "activation": activation}
        calls = [partial(fp4.linear, weight=each, **options) for each in orders[activation == "swiglu"]]
        found["ours", name] = peers.Operand(
            calls, lambda x, options=options: naive.linear(x.float(), packed, **options), nbytes, error
        )
        if name in DENSE_EPILOGUES:
            calls = [partial(_dense, weight=each, **options) for each in copies]
            found[peers.BASE, name] = peers.Operand(
                calls, partial(_exact, weight=weight, **options), weight.nbytes, 0.0
            )
    return found


def _dense(x, *, weight, bias, activation):
    return naive.activate(F.linear(x, weight, bias), activation)


def _exact(x, *, weight, bias, activation):
    return _dense(x.float(), weight=weight.float(), bias=None if bias is None else bias.float(), activation=activation)


def extra_bytes(call, x):
    """The most that a call holds at once beside its operands and its result."""
    if DEVICE != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call(x)
    return torch.cuda.max_memory_allocated() - before - out.untyped_storage().nbytes()


def measure_gradient(shape, ms, rounds):
    weight, why, rows = weight_of(shape), {}, []
    operands = {}
    for name, build in GRADIENTS.items():
        operands[name], why[name] = attempt(build, weight, 2 if DEVICE == "cpu" else None)
    del weight
    for m in ms:
        dy, failed = torch.randn(m, shape[0], device=DEVICE).bfloat16(), dict(why)
        ready = ready_cells(operands, dy, failed)
        extra = {name: extra_bytes(operands[name].calls[0], dy) for name in ready}
        measure(ready, rounds)
        for name in GRADIENTS:
            row = {"N": shape[0], "K": shape[1], "M": m, "arm": name}
            if name in ready:
                row |= ready[name].row(ready.get(peers.BASE)) | {"extra_bytes": extra[name]}
                row["weight_error"] = operands[name].weight_error
            else:
                row["why"] = failed[name]
            rows.append(row)
    return rows


def measure_epilogue(shape, ms, rounds, names=tuple(EPILOGUES)):
    operands, rows = epilogues(weight_of(shape), names, 2 if DEVICE == "cpu" else None), []
    for m in ms:
        x, failed = torch.randn(m, shape[1], device=DEVICE).bfloat16(), {}
        ready = ready_cells(operands, x, failed)
        measure(ready, rounds)
        for arm, name in operands:
            row = {"N": shape[0], "K": shape[1], "M": m, "arm": arm, "epilogue": name}
            if (arm, name) in ready:
                row |= ready[arm, name].row(ready.get((peers.BASE, name)))
                bare = ready.get((arm, "product"))
                row["over_product"] = row["us"] / bare.row(None)["us"] if bare else None
            else:
                row["why"] = failed[arm, name]
            rows.append(row)
    return rows


def gradient_report(rows):
    """Speed over bf16 beside the goals, and memory."""
    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    goals = {shape: {row["M"]: GOAL_SPEED for row in rows if row["M"] >= GOAL_FROM} for shape in shapes}
    lines = [summary(rows, name, goals if name == peers.OURS[0] else {}) for name in GRADIENTS if name != peers.BASE]
    for name in GRADIENTS:
        taken = [row["extra_bytes"] for row in rows if row["arm"] == name and row.get("extra_bytes") is not None]
        if taken:
            verdict = f" (goal {GOAL_MIB}: {'met' if max(taken) <= GOAL_MIB * 2**20 else 'MISSED'})"
            goal = verdict if name in peers.OURS else ""
            lines.append(f"{name}: at most {max(taken) / 2**20:.1f} MiB beside operands and result{goal}")
    return "\n\n".join([*lines, "\n".join(reasons(rows)), f"dX = dY W: {goals_note()}"])


def epilogue_table(rows, shape):
    mine = {(row["arm"], row["epilogue"], row["M"]): row for row in rows if (row["N"], row["K"]) == shape}
    ms = sorted({m for _, _, m in mine})
    lines = [f"| {shape[0]} x {shape[1]} | {' | '.join(f'M={m}' for m in ms)} |", "|---" * (len(ms) + 1) + "|"]
    for arm, name in dict.fromkeys((arm, name) for arm, name, _ in mine):
        shown = [_epilogue_shown(mine[arm, name, m]) for m in ms]
        lines.append(f"| {arm}: {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, *reasons(mine.values())])


def _epilogue_shown(row):
    if "why" in row:
        return "WRONG" if "WRONG" in row["why"] else "failed"
    over = "-" if row["over_product"] is None else f"{row['over_product']:.3f}"
    if row["epilogue"] == "product":
        over = f"{row['us']:.1f} us"
    return f"{over} ({row['speed']:.2f}x)" if "speed" in row and row["arm"] != peers.BASE else over


def epilogue_report(rows):
    ours = [row for row in rows if row["arm"] == "ours" and row.get("over_product") and row["epilogue"] != "product"]
    over = [row for row in ours if row["over_product"] > GOAL_EPILOGUE]
    lines = [
        f"time over the arm's own product alone (speed over bf16, unfused); goal {GOAL_EPILOGUE}, on an NVIDIA H200"
    ]
    lines.append(f"above it: {len(over)} of {len(ours)}")
    lines += [f"{row['N']} x {row['K']}, M={row['M']}, {row['epilogue']}: {row['over_product']:.3f}" for row in over]
    return "\n".join(lines)


def warm(part, shape, ms, arm):
    """Compile what one arm needs, in a process of its own."""
    weight = weight_of(shape)
    operand = GRADIENTS[arm](weight, 1) if part == "gradient" else epilogues(weight, (arm,), 1)["ours", arm]
    for m in ms:
        operand.calls[0](torch.randn(m, shape[part == "epilogue"], device=DEVICE).bfloat16())
    synchronize()


def warm_aside(parts, shapes_of, ms_of):
    arms = {"epilogue": EPILOGUES, "gradient": peers.OURS}
    jobs = [
        ("--warm", arm, "--parts", part, "--shapes", shape, "--ms", *ms_of[part])
        for part in sorted(parts)
        for shape in shapes_of[part]
        for arm in arms[part]
    ]
    for job, why in zip(jobs, in_processes(__file__, jobs), strict=True):
        if why is not None:
            print(*job[1:6], why, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--shapes", nargs="*", help="N x K")
    parser.add_argument("--ms", nargs="*", type=int, help="rows of x, and of dY")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to check the script without a GPU")
    parser.add_argument("--no-warm", action="store_true", help="do not compile in processes of their own first")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes_of = {part: options.shapes or (SMALL_SHAPES if options.small else SHAPES[part]) for part in options.parts}
    ms_of = {part: options.ms or (SMALL_MS if options.small else MS[part]) for part in options.parts}
    begin = time.perf_counter()
    if options.warm:
        with torch.no_grad():
            warm(*options.parts, tuple(map(int, options.shapes[0].split("x"))), options.ms, options.warm)
        return
    if DEVICE == "cuda" and not options.no_warm:
        warm_aside(options.parts, shapes_of, ms_of)
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    reports, wrong = [], False
    with torch.no_grad():
        for part in options.parts:
            measured, rows = {"gradient": measure_gradient, "epilogue": measure_epilogue}[part], []
            for name in shapes_of[part]:
                shape = tuple(map(int, name.split("x")))
                rows += measured(shape, ms_of[part], options.rounds)
                shown = {"gradient": table, "epilogue": epilogue_table}[part](rows, shape)
                print(f"\n{part} {shown}\n{time.perf_counter() - begin:.0f} s", flush=True)
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()
                path = record.write(f"fp4_{part}", rows, folder=options.out)
            reports.append(f"{(gradient_report if part == 'gradient' else epilogue_report)(rows)}\n{path}")
            wrong |= any("WRONG" in (row.get("why") or "") and row["arm"].startswith("ours") for row in rows)
    print("", *reports, sep="\n\n")
    if wrong:
        sys.exit("ours gave wrong numbers")


if __name__ == "__main__":
    main()
