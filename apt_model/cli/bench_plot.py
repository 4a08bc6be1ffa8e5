"""The benchmark as a picture: the speed of 4-bit layers over their peer, and shares of the ceilings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apt_model.cli.bench_text import figure, percent
from apt_model.core.errors import MissingExtraError
from apt_model.core.files import atomic_file
from apt_model.optimization.bench.rows import Row
from apt_model.optimization.bench.run import Report
from apt_model.trainer.plot import can_plot

_COLOURS = {"nvfp4": "tab:blue", "mxfp4": "tab:orange"}
_OTHER = {"linear": "0.6", "attention": "tab:green", "link": "tab:purple", "disk": "tab:brown"}
_STYLES, _MARKS = ("-", "--", ":"), ("o", "s", "^")
# Inches of a bar, and of what is above and below all of them; how far from each other values are on a logarithm.
_BAR, _FRAME, _FAR = 0.3, 2.2, 12
# How far a bar is from one of another kind; the next of its own is 1 away.
_APART = 1.5


def draw(report: Report, path: Path) -> None:
    """Write the picture as a PNG; `MissingExtraError` without matplotlib."""
    if not can_plot():
        raise MissingExtraError("the benchmark's picture", "matplotlib", "plot")
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional and slow to import

    bars = _shown(report.rows)
    drawn = Figure(figsize=(13, max(5.0, _FRAME + _BAR * len(bars))), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.25))
    _speed_ups(left, [row for row in report.rows if row.part == "linear"])
    _shares(right, bars)
    drawn.suptitle(_title(report), fontsize=10)
    drawn.supxlabel(_ceilings(report), fontsize=8, color="0.3")
    with atomic_file(path) as partial:
        drawn.savefig(partial, dpi=120, format="png")


def _title(report: Report) -> str:
    found = report.machine
    commit = f" at {found['commit'][:10]}" if found["commit"] else ""
    text = f"{found['device']['name']}, torch {found['torch']}, apt-model {found['apt_model']}{commit}, {found['date']}"
    return f"{text}\nmeasured with --small: the figures say nothing of the machine" if report.small else text


def _ceilings(report: Report) -> str:
    known = [
        f"{name} {figure(each.rate)} {each.unit}" for name, each in report.ceilings.items() if each.rate is not None
    ]
    half = -(-len(known) // 2) if len(known) > 4 else len(known)
    lines = [",  ".join(part) for part in (known[:half], known[half:]) if part]
    return "ceilings:  " + "\n".join(lines)


def _speed_ups(axes: Any, rows: Sequence[Row]) -> None:
    """Lines by rows of input, one a shape and format."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 - optional

    found = [row for row in rows if row.speed_up is not None and row.rows is not None]
    shapes = list(dict.fromkeys(row.shape for row in found))
    for what in dict.fromkeys(row.what for row in found):
        for number, shape in enumerate(shapes):
            line = [(row.rows, row.speed_up) for row in found if (row.what, row.shape) == (what, shape)]
            if line:
                axes.plot(
                    *zip(*line, strict=True), color=_COLOURS.get(what), linestyle=_STYLES[number % len(_STYLES)],
                    marker=_MARKS[number % len(_MARKS)], markersize=5, label=f"{what}, {shape}",
                )  # fmt: skip
    peers = list(dict.fromkeys(row.peer for row in found))
    axes.axhline(1, color="0.5", linewidth=1, label=f"peer: {' or '.join(map(str, peers)) or 'none'}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows of input", ylabel="times as fast as the peer", title="FP4 linear layers over their peer")
    counts = sorted({row.rows for row in found if row.rows is not None})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    values = [row.speed_up for row in found if row.speed_up]
    if values and max(*values, 1) > _FAR * min(*values, 1):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.5, max(*values, 1) * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Rows with a share: of linear layers the first shape alone, and of peers the one that counts."""
    first = next((row.shape for row in rows if row.part == "linear"), None)
    counted = {(row.rows, row.peer) for row in rows if row.part == "linear" and row.shape == first and row.peer}
    found = []
    for row in rows:
        ours = row.part != "linear" or row.peer is not None or (row.rows, row.what) in counted
        if row.share is not None and ours and (row.part != "linear" or row.shape == first):
            found.append(row)
    return found


def _shares(axes: Any, rows: Sequence[Row]) -> None:
    """A bar a row, with its rate and the ceiling that it is a share of; those of a kind stand together."""
    places: list[float] = []
    groups = [_group(row) for row in rows]
    for number, group in enumerate(groups):
        apart = number and group != groups[number - 1]
        places.append((places[-1] + (_APART if apart else 1)) if places else 0.0)
    shares = [row.share or 0.0 for row in rows]
    axes.axvline(1, color="0.5", linewidth=1, zorder=0)
    axes.barh(places, shares, color=[_colour(row) for row in rows], height=0.8)
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(1.0, *shares) if shares else 1.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    for place, share, row in zip(places, shares, rows, strict=True):
        text = f"{percent(share)} of {row.ceiling}, {figure(row.rate or 0.0)} {row.unit}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(share + 0.015, place, text, va="center", fontsize=7.5, bbox=box)
    first = next((row.shape for row in rows if row.part == "linear"), "")
    axes.set(xlabel="share of the ceiling that bounds it", title=f"Against the ceilings (linear layers: {first})")
    axes.spines[["top", "right"]].set_visible(False)


def _group(row: Row) -> tuple[str, int | None]:
    return row.part, row.rows


def _colour(row: Row) -> str:
    pale = row.part == "attention" and row.peer is None
    return _COLOURS.get(row.what, "#a6d8a6" if pale else _OTHER[row.part])


def _label(row: Row) -> str:
    if row.part == "linear":
        return f"{row.what}, {row.rows:,} row{'s'[: (row.rows or 0) > 1]}"
    if row.part == "attention":
        return f"{'SDPA' if row.peer else row.what}, {row.rows:,} positions"
    return f"{row.part}: {row.what}" if row.part == "link" else row.what
