"""The loss curve of a run as a PNG."""

import importlib.util
from pathlib import Path

from apt_model.core.errors import MissingExtraError
from apt_model.core.files import atomic_file
from apt_model.trainer.metrics import read_metrics

CURVE_FILE = "curve.png"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curve(root: Path) -> Path:
    """Draw the run's training loss and held-out bits per byte against steps into `root`/curve.png."""
    if not can_plot():
        raise MissingExtraError("the loss curve", "matplotlib", "plot")
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional and slow to import

    rows = read_metrics(root)
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    heldout = [(row["step"], row["bits_per_byte"]) for row in rows if row.get("bits_per_byte") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, label="training loss")
    axes.set(xlabel="step", ylabel="training loss, nats a token", title=root.name)
    axes.grid(alpha=0.3)
    lines = list(axes.lines)
    if heldout:
        right = axes.twinx()
        right.plot(*zip(*heldout, strict=True), color="tab:orange", marker="o", markersize=4, label="held-out")
        right.set_ylabel("held-out text, bits a byte")
        last = heldout[-1]
        right.annotate(f"{last[1]:.3f}", last, textcoords="offset points", xytext=(-6, 8), ha="right")
        lines += list(right.lines)
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    with atomic_file(root / CURVE_FILE) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return root / CURVE_FILE
