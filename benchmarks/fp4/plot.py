"""Draw what `linear.py` measured: speed over bf16 against the rows of x, one panel a shape.

python benchmarks/fp4/plot.py benchmarks/results/nvidia-h200/fp4_linear.json [--out FILE.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Name -> colour, marker, width: ours stand out, what is quoted is dashed.
STYLES = {
    "ours nvfp4": ("#d62728", "o", 2.4),
    "ours mxfp4": ("#ff9896", "o", 1.6),
    "Marlin int4": ("#7f7f7f", "x", 1.2),
    "bitsandbytes fp4": ("#1f77b4", "s", 1.2),
    "bitsandbytes nf4": ("#aec7e8", "s", 1.2),
    "torchao int4": ("#2ca02c", "^", 1.2),
    "torchao nvfp4": ("#98df8a", "^", 1.2),
    "gemlite mxfp4": ("#9467bd", "D", 1.2),
}
BASE = "bf16"
# Bits of a bf16 weight over those of an nvfp4 one: nothing that reads every weight once can be faster.
LIMIT = 16 / 4.5


def panel(axes, rows, shape):
    ms = sorted({row["M"] for row in rows})
    for name, (colour, marker, width) in STYLES.items():
        points = sorted((row["M"], row["speed"]) for row in rows if row["arm"] == name and "speed" in row)
        if points:
            style = "--" if name.startswith("Marlin") else "-"
            axes.plot(
                *zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, lw=width, label=name
            )
    axes.axhline(1, color="black", lw=0.8)
    axes.axhline(LIMIT, color="black", lw=0.6, ls=":")
    axes.annotate("16 / 4.5 bits", (ms[-1], LIMIT), ha="right", va="bottom", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ms, [str(m) for m in ms])
    axes.minorticks_off()
    axes.set_ylim(0, 3.8)
    axes.set_title(f"N = {shape[0]}, K = {shape[1]}", fontsize=10)
    axes.grid(alpha=0.25)


def draw(found, path):
    rows = [row for row in found["rows"] if "speed" in row and row["arm"] != BASE]
    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 3.4 * lines + 0.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, shape in zip(grid.flat, shapes, strict=False):
        panel(axes, [row for row in rows if (row["N"], row["K"]) == shape], shape)
    for axes in grid[:, 0]:
        axes.set_ylabel("speed over bf16")
    for i, axes in enumerate(grid.flat):
        if i >= len(shapes):
            axes.axis("off")
        elif i + columns >= len(shapes):
            axes.set_xlabel("M, rows of x")
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [f"{name} (quoted)" if name.startswith("Marlin") else name for name in handles]
    spare = len(shapes) < grid.size
    place = {"loc": "center", "ncols": 1} if spare else {"loc": "outside lower center", "ncols": 4}
    (grid.flat[-1] if spare else figure).legend(handles.values(), labels, fontsize=9, frameon=False, **place)
    machine = found["machine"]
    versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "driver") if key in machine)
    figure.suptitle(
        f"Linear over 4-bit weights, {machine['device']}: GPU time over rotating weights ({versions})", fontsize=11
    )
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the JSON that linear.py wrote")
    parser.add_argument("--out", type=Path, help="default: the JSON's name with .png")
    options = parser.parse_args()
    path = options.out or options.file.with_suffix(".png")
    draw(json.loads(options.file.read_text()), path)
    print(path)


if __name__ == "__main__":
    main()
