"""What a launch of the FP4 kernels waits for, by Nsight Compute's counters.

    python benchmarks/fp4/profile_ncu.py --ncu [--cells 8192x8192x16 ...] [--setting "Tile(1, 64, 4, 3, 2)" ...] [--out FOLDER]

A cell is N x K x M; without --setting its launch is the one that a layer would take. Without --ncu each launch is only
done, between the marks that `ncu --profile-from-start off` looks for. With it this script runs itself under ncu, and
prints of each launch what bounds it, what its warps are stalled for, and the machine instructions at which they are.
What cannot be read is printed as ncu gave it; with --out the report and the tables stay there.
"""

import argparse
import collections
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

CELLS = ("28672x8192x1", "8192x8192x1", "8192x8192x16", "4096x4096x16", "28672x8192x64", "4096x4096x256")
WARM_UPS = 3
FIGURES = (
    ("time, us", r"gpu__time_duration\.sum", 1e-3),
    ("DRAM throughput, %", r"(gpu__)?dram_+throughput\.avg\.pct_of_peak_sustained_elapsed", 1),
    ("DRAM read, MB", r"dram__bytes_read\.sum", 1e-6),
    (
        "L2 throughput, %",
        r"lts__t_sectors\.avg\.pct_of_peak_sustained_elapsed|lts__throughput\.avg\.pct_\w+_elapsed",
        1,
    ),
    ("L2 hits, %", r"lts__t_sector_hit_rate\.pct", 1),
    ("L1 throughput, %", r"l1tex__throughput\.avg\.pct_of_peak_sustained_(active|elapsed)", 1),
    ("bank conflicts", r"l1tex__data_bank_conflicts_pipe_lsu\.sum", 1),
    ("waves", r"launch__waves_per_multiprocessor", 1),
    ("registers", r"launch__registers_per_thread", 1),
    ("occupancy, %", r"sm__warps_active\.avg\.pct_of_peak_sustained_active", 1),
    ("occupancy possible, %", r"sm__maximum_warps_per_active_cycle_pct", 1),
    ("issue slots busy, %", r"sm__inst_issued\.avg\.pct_of_peak_sustained_active", 1),
    ("warps eligible", r"smsp__warps_eligible\.avg\.per_cycle_active", 1),
    ("tensor pipe, %", r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_active", 1),
    ("instructions", r"smsp__inst_executed\.sum", 1),
)
STALL = r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active(?:\.ratio)?"


def settings_of(texts):
    from apt_model.ops.fp4.tables import Decode, Tile

    found = []
    for text in texts:
        parts = re.fullmatch(r"\s*(Decode|Tile)\(([\d,\s]+)\)\s*", text)
        if parts is None:
            raise SystemExit(f'--setting: expected "Decode(...)" or "Tile(...)", got {text!r}')
        found.append({"Decode": Decode, "Tile": Tile}[parts[1]](*map(int, parts[2].split(","))))
    return found


def launches(options):
    """Each launch once between the marks, and nothing else there; the weight and the one before it are two copies."""
    import torch

    from apt_model.ops.fp4 import launch
    from apt_model.ops.fp4.layout import shuffle
    from benchmarks.fp4.tune import random_packed

    given = settings_of(options.setting)
    for cell in options.cells:
        n, k, m = map(int, cell.split("x"))
        order = shuffle(random_packed(n, k, options.format), torch.bfloat16)
        other = order._replace(words=order.words.clone(), scales=order.scales.clone())
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for setting in given or [launch.choose(m, order, x.dtype)]:
            if setting is None:
                print(f"{cell}: slabs, nothing to profile", flush=True)
                continue
            for _ in range(WARM_UPS):
                launch.run(x, order, None, None, setting)
                launch.run(x, other, None, None, setting)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            launch.run(x, order, None, None, setting)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"LAUNCH {cell} {options.format} {setting}", flush=True)


def number(text):
    try:
        return float(text.replace(",", ""))
    except (AttributeError, ValueError):
        return None


def raw_page(text):
    """One name -> value for each kernel of `--page raw --csv`."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    start = next(i for i, row in enumerate(rows) if "Kernel Name" in row and "ID" in row)
    kernels = [dict(zip(rows[start], row, strict=False)) for row in rows[start + 1 :]]
    return [kernel for kernel in kernels if number(kernel["ID"]) is not None]  # units come first


def source_page(text):
    """One list of instructions for each kernel of `--page source --csv`."""
    kernels, header = [], None
    for row in csv.reader(text.splitlines()):
        if row and row[0] == "Kernel Name":
            header = None
            kernels.append([])
        elif "Source" in row and "Address" in row:
            header = row
            if not kernels:
                kernels.append([])
        elif header is not None and len(row) == len(header):
            kernels[-1].append(dict(zip(header, row, strict=True)))
    return kernels


def summary(kernel):
    """What bounds it, and what its warps are stalled for: cycles between two instructions of a warp."""
    found = []
    for label, pattern, factor in FIGURES:
        values = {name: number(value) for name, value in kernel.items() if re.fullmatch(pattern, name)}
        known = [value for value in values.values() if value is not None]
        found.append(f"{label} {max(known) * factor:,.2f}" if known else f"{label} -")
    stalls = {match[1]: number(value) or 0.0 for name, value in kernel.items() if (match := re.fullmatch(STALL, name))}
    top = sorted(
        ((name, value) for name, value in stalls.items() if "not_issued" not in name), key=lambda each: -each[1]
    )
    return ["; ".join(found), "stalled for: " + ", ".join(f"{name} {value:.2f}" for name, value in top[:8])]


def hot_spots(instructions, count):
    """The instructions at which most samples of warps were taken, with what they were stalled for."""
    columns = list(instructions[0])
    samples = next(name for name in columns if re.search(r"All Samples|^# ?Samples$|^Samples$", name))
    reasons = [name for name in columns if name.startswith("stall_") and "not" not in name.lower()]
    total = sum(number(row[samples]) or 0.0 for row in instructions) or 1.0
    ranked = sorted(enumerate(instructions), key=lambda each: -(number(each[1][samples]) or 0.0))
    lines, opcodes = [], collections.Counter()
    for row in instructions:
        words = [word for word in row["Source"].split() if not word.startswith("@")]
        opcodes[words[0].split(".")[0] if words else "?"] += number(row[samples]) or 0.0
    lines.append("by opcode: " + ", ".join(f"{name} {each / total:.1%}" for name, each in opcodes.most_common(10)))
    for place, row in ranked[:count]:
        why = sorted(((number(row[name]) or 0.0, name.removeprefix("stall_")) for name in reasons), reverse=True)[:2]
        why = ", ".join(f"{name} {each / total:.1%}" for each, name in why if each)
        lines.append(f"{place:5d} {(number(row[samples]) or 0.0) / total:6.1%}  {row['Source'].strip()[:72]:72s} {why}")
    return lines


def output_of(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return (
        done.stdout,
        f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}",
    )


def page_of(ncu, report, page, *more):
    """A page of the report as CSV, which is kept beside it, and what ncu said in all."""
    text, said = output_of([ncu, "--import", report, "--page", page, "--csv", "--print-units", "base", *more])
    if more and not text.strip():  # not every version has this option
        return page_of(ncu, report, page)
    report.with_name(f"{page}.csv").write_text(text)
    return text, said


def shown(function, *arguments, raw):
    """What the function makes of ncu's output, or that output."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - the output is another than expected
        return [f"not understood ({type(error).__name__}: {error}); ncu said:", raw]


def under_ncu(options, folder):
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    report = folder / "profile.ncu-rep"
    own = ["--cells", *options.cells, "--format", options.format]
    own += ["--setting", *options.setting] if options.setting else []
    taken, said = output_of([
        ncu, "--clock-control", "none", "--set", "full", "--section", "SourceCounters", "--section", "WarpStateStats",
        "--profile-from-start", "off", "-k", f"regex:{options.kernels}", "-f", "-o", report, sys.executable, __file__, *own,
    ])  # fmt: skip
    if not report.exists():
        raise SystemExit(f"ncu made no report:\n{said}")
    names = [line.removeprefix("LAUNCH ") for line in taken.splitlines() if line.startswith("LAUNCH ")]
    raw, raw_said = page_of(ncu, report, "raw")
    source, source_said = page_of(ncu, report, "source", "--print-source", "sass")
    kernels = shown(raw_page, raw, raw=raw_said)
    sources = shown(source_page, source, raw=source_said)
    if not kernels or isinstance(kernels[0], str):
        raise SystemExit("\n".join(kernels or [said]))
    for i, kernel in enumerate(kernels):
        print(f"\n{names[i] if len(names) == len(kernels) else '?'}: {kernel['Kernel Name'][:60]}")
        print(*shown(summary, kernel, raw=str(kernel)[:3000]), sep="\n")
        if len(sources) == len(kernels):
            print(*shown(hot_spots, sources[i], options.lines, raw=str(sources[i])[:1500]), sep="\n")
    if len(names) != len(kernels):
        print(f"{len(names)} launches and {len(kernels)} kernels; ncu said:\n{said}")
    if len(sources) != len(kernels):
        print(f"{len(sources)} lists of instructions for {len(kernels)} kernels; ncu said:\n{source_said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=list(CELLS), help="N x K x M")
    parser.add_argument("--setting", nargs="*", default=[], help="launches to take for every cell")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--ncu", action="store_true", help="run this under ncu and say what it found")
    parser.add_argument(
        "--kernels", default="decode_kernel|tile_kernel", help="which kernels, as ncu's regular expression"
    )
    parser.add_argument("--lines", type=int, default=15, help="instructions that are shown of a launch")
    parser.add_argument("--out", type=Path, help="folder for ncu's report and tables")
    options = parser.parse_args()
    if not options.ncu:
        launches(options)
        return
    settings_of(options.setting)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        under_ncu(options, options.out or Path(folder))


if __name__ == "__main__":
    main()
