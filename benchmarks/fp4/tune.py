"""Try launches of the FP4 kernels; each is compared with the definition before it is timed.

    python benchmarks/fp4/tune.py [--shapes 8192x8192 ...] [--ms 1 16 ...] [--kinds decode tile] [--formats nvfp4 mxfp4]
        [--top FILE ...] [--out FOLDER]

Launches are compiled first, in processes of their own. GPU time by graph replay over rotating weights of at least 400 MB.
The best of each cell is what `apt_model/ops/fp4/tables.py` holds; the last lines printed can be put there.

With --top only the launch that is in the table, the best of earlier files and what is one step beside the very best of
them are tried; the fastest of a cell are then timed once more, in turns.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from apt_model.ops.fp4 import launch, measured, naive
from apt_model.ops.fp4.format import PackedWeight
from apt_model.ops.fp4.layout import shuffle
from apt_model.ops.fp4.tables import Decode, Tile
from benchmarks import record

SHAPES = ["28672x8192", "8192x8192", "14336x4096", "4096x4096"]
ROTATING_BYTES = 400_000_000
# With --top: the best of earlier files that are tried, those of them whose neighbours are, and those timed once more.
TOP, NEAR, AGAIN, AGAIN_ROUNDS = 6, 2, 4, 5
# What is in the table stays unless a launch is faster by more than this; a format has an entry of its own likewise.
KEEP, OWN = 1.01, 1.03
STEPS = {Decode: ("wg", "rep", "ahead", "split"), Tile: ("wg", "bm", "c", "stages", "split")}


def random_packed(n, k, form):
    """Codes and scales at random: what they stand for does not matter to the speed."""
    block = 16 if form == "nvfp4" else 32
    codes = torch.randint(0, 256, (n, -(-k // 16) * 8), device="cuda", dtype=torch.uint8)
    scale = torch.randint(0x20, 0x48, (n, -(-k // block)), device="cuda", dtype=torch.uint8)
    if form == "mxfp4":
        return PackedWeight(codes, scale + 80, None, k)
    scale[::7, ::5] = 0
    return PackedWeight(codes, scale.view(torch.float8_e4m3fn), torch.full((1,), 48.0, device="cuda"), k)


def candidates(n, k, m, kinds):
    device = torch.device("cuda", torch.cuda.current_device())
    found = measured.candidates(m, n, k, launch.is_hopper(device), launch.facts(device.index)[1])
    return [each for each in found if type(each).__name__.lower() in kinds]


def earlier(files):
    """(Shape, M) -> launches of these files, the fastest first."""
    found = {}
    for row in (row for file in files for row in json.loads(file.read_text())["rows"]):
        kind = {"Decode": Decode, "Tile": Tile}[row["kind"]]
        setting = kind(**{name: row[name] for name in kind._fields if name in row})
        known = found.setdefault((row["shape"], row["m"]), {})
        known[setting] = min(row["us"], known.get(setting, math.inf))
    return {cell: sorted(known, key=known.get) for cell, known in found.items()}


def neighbours(setting, every):
    """Launches of `every` that differ in one number, by one step of those that it takes there."""
    kind = type(setting)
    others = [each for each in every if type(each) is kind]
    ranks = {}
    for name in STEPS[kind]:
        values = sorted({getattr(each, name) for each in (*others, setting)})
        ranks[name] = {value: i for i, value in enumerate(values)}

    def apart(other):
        return sum(abs(ranks[name][getattr(setting, name)] - ranks[name][getattr(other, name)]) for name in ranks)

    return [other for other in others if apart(other) == 1]


def chosen(cell, known, kept, every):
    """What is tried of a cell: all, or what is in the table, the best of before, and what is beside them."""
    n, k, m = cell
    at = [(abs(math.log(m / rows)), rows) for shape, rows in known if shape == f"{n}x{k}"]
    if not at:
        return every
    kinds = {type(each) for each in every}
    best = [each for each in known[f"{n}x{k}", min(at)[1]] if type(each) in kinds][:TOP]
    beside = [other for each in best[:NEAR] for other in neighbours(each, every)]
    return list(dict.fromkeys([*([kept] if type(kept) in kinds else []), *best, *beside]))


def tried(n, k, m, options):
    return chosen((n, k, m), options.known, present(n, k, m), candidates(n, k, m, options.kinds))


def present(n, k, m):
    device = torch.device("cuda", torch.cuda.current_device())
    return launch.shipped(launch.bucket_of(m), n, k, device).setting


def warm(jobs, form):
    """Compile each launch by doing it once."""
    orders = {}
    for (n, k, m), setting in jobs:
        if (n, k) not in orders:
            orders[n, k] = shuffle(random_packed(n, k, form), torch.bfloat16)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        try:
            launch.run(x, orders[n, k], None, None, setting)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - a launch that does not fit the machine
            print("no", n, k, m, setting, type(error).__name__, str(error)[:100].replace("\n", " "), flush=True)


def warm_aside():
    parts = min(15, os.cpu_count() or 1)
    command = [sys.executable, *sys.argv, "--warm"]
    workers = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]  # noqa: S603
    for worker in workers:
        worker.wait()


def seconds_of(setting, x, orders, expected):
    """GPU time of one product, or why there is none."""
    try:
        if expected is not None:
            out = launch.run(x, orders[0], None, None, setting)
            error = float((out.float() - expected).norm() / expected.norm())
            if not error < measured.LARGEST_ERROR:
                return f"wrong: {error}"

        def call():
            for order in orders:
                launch.run(x, order, None, None, setting)

        return record.graph_seconds(call, repeat=1 if len(x) > 256 else 2, rounds=3) / len(orders)
    except Exception as problem:  # noqa: BLE001 - a launch that does not fit the machine
        return f"{type(problem).__name__}: {str(problem)[:80]}".replace("\n", " ")


def measure(shape, form, options, until):
    n, k = map(int, shape.split("x"))
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    packed = random_packed(n, k, form)
    first = shuffle(packed, torch.bfloat16)
    held = first.words.nbytes + first.scales.nbytes
    orders = [first]
    while len(orders) * held < ROTATING_BYTES or len(orders) < 2:
        orders.append(first._replace(words=first.words.clone(), scales=first.scales.clone()))
    dense = [w, *(w.clone() for _ in range(max(1, ROTATING_BYTES // w.nbytes)))]
    for m in options.ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        expected = naive.linear(x, packed).float()
        bf16 = record.graph_seconds(lambda x=x: [F.linear(x, each) for each in dense], repeat=2, rounds=3) / len(dense)
        found = []
        for setting in tried(n, k, m, options):
            if time.time() > until:
                print("time is up", flush=True)
                break
            seconds = seconds_of(setting, x, orders, expected)
            if isinstance(seconds, str):
                print(shape, m, setting, seconds, flush=True)
                continue
            found.append((seconds, setting))
        if options.known:
            found = once_more(found, present(n, k, m), x, orders)
        for seconds, setting in found:
            yield {
                "shape": shape, "format": form, "m": m, "kind": type(setting).__name__, **setting._asdict(),
                "us": seconds * 1e6, "bf16_us": bf16 * 1e6, "ratio": bf16 / seconds, "bytes_per_s": held / seconds,
            }  # fmt: skip
        for kind in (Decode, Tile):
            best = sorted((each for each in found if isinstance(each[1], kind)), key=lambda each: each[0])[:3]
            shown = "; ".join(
                f"{'-'.join(map(str, s))} {t * 1e6:.2f} us {bf16 / t:.2f}x {held / t / 1e12:.2f} TB/s" for t, s in best
            )
            if best:
                print(f"{shape} {form} M={m}: bf16 {bf16 * 1e6:.1f} us; {kind.__name__} {shown}", flush=True)


def once_more(found, kept, x, orders):
    """The fastest, and what is in the table, timed in turns; the others stay as they were."""
    order = sorted(found, key=lambda each: each[0])
    again = [setting for i, (_, setting) in enumerate(order) if i < AGAIN or setting == kept]
    times = {setting: [] for setting in again}
    for _ in range(AGAIN_ROUNDS):
        for setting, seconds in times.items():
            seconds.append(seconds_of(setting, x, orders, None))
    right = {
        setting: seconds for setting, seconds in times.items() if not any(isinstance(each, str) for each in seconds)
    }
    return [(statistics.median(right[setting]) if setting in right else before, setting) for before, setting in order]


def winners(rows, kept_of):
    """Entries for the table as Python: one for all formats, and those of formats that gain more than 3% by their own."""
    cells = {}
    for row in rows:
        kind, bucket = {"Decode": Decode, "Tile": Tile}[row["kind"]], min(launch.bucket_of(row["m"]), 1024)
        by_format = cells.setdefault((*map(int, row["shape"].split("x")), bucket), {})
        times = by_format.setdefault(row["format"], {}).setdefault(row["m"], {})
        times[kind(**{name: row[name] for name in kind._fields})] = row["us"]
    lines = []
    for (n, k, bucket), by_format in sorted(cells.items()):
        found = {form: _over_all(by_m) for form, by_m in sorted(by_format.items(), key=lambda each: each[0] != "nvfp4")}
        first, *others = found
        kept = kept_of(n, k, bucket)
        best = _best(found[first], kept)
        lines.append(f"    ({n}, {k}, {bucket}): {_written(best)},  # {_figures(found[first], best, kept)}")
        for form in others:
            own = _best(found[form], best, OWN)
            if own != best:
                lines.append(
                    f'    ({n}, {k}, {bucket}, "{form}"): {_written(own)},  # {_figures(found[form], own, best)}'
                )
    return "\n".join(lines)


def _over_all(by_m):
    """Geometric mean over the numbers of rows that one launch serves, of the launches that were timed at all of them."""
    common = set.intersection(*map(set, by_m.values())) or set(next(iter(by_m.values())))
    each = {setting: [times[setting] for times in by_m.values() if setting in times] for setting in common}
    return {setting: statistics.geometric_mean(times) for setting, times in each.items()}


def _best(times, kept, margin=KEEP):
    best = min(times, key=times.get)
    return kept if kept in times and times[kept] <= times[best] * margin else best


def _written(setting):
    values = setting[:-1] if isinstance(setting, Decode) and setting.rep == 1 else setting
    return f"{type(setting).__name__}({', '.join(map(str, values))})"


def _figures(times, taken, before):
    if taken == before:
        return f"{times[taken]:.2f} us"
    return f"{times[taken]:.2f} us, {_written(before) if before else 'slabs'} {times.get(before, math.nan):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--ms", nargs="*", type=int, default=[1, 16, 64, 256, 1024], help="rows of x")
    parser.add_argument("--kinds", nargs="*", default=["decode", "tile"])
    parser.add_argument("--formats", nargs="*", default=["nvfp4"])
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--seconds", type=float, default=200, help="stop trying after this long")
    parser.add_argument("--top", nargs="*", type=Path, default=[], help="earlier fp4_tune*.json: try their best only")
    parser.add_argument("--warm", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin, options.known = time.time(), earlier(options.top)
    cells = [(*map(int, shape.split("x")), m) for shape in options.shapes for m in options.ms]
    jobs = {each: (cell, each) for cell in cells for each in tried(*cell, options)}
    every = sorted(jobs.values(), key=str)
    if options.warm:
        part, parts = options.warm
        for form in options.formats:
            warm(every[part::parts], form)
        return
    warm_aside()
    print(f"{len(every)} launches compiled in {time.time() - begin:.0f} s", flush=True)
    rows = []
    for shape, form in itertools.product(options.shapes, options.formats):
        rows += measure(shape, form, options, begin + options.seconds)
    print(winners(rows, present))
    print(record.write("fp4_tune_top" if options.top else "fp4_tune", rows, folder=options.out))


if __name__ == "__main__":
    main()
