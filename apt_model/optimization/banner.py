"""The banner of `vb.enable()`: eight rows, each a fact of this machine or the words that there is none."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from apt_model import __version__

ABSENT = "not in this version"
NOT_MEASURED = "not measured (vb.enable(calibrate=True), or apt-model bench)"


def gibibytes(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / 2**30:.1f} GiB"


def title(facts: Mapping[str, Any]) -> str:
    """The line above the rows: the mode, and the precision with its reason."""
    native = "natively" if facts["native_bf16"] else "only by way of fp32"
    weights = facts["mode"] in ("speed", "full")
    precision = ("bf16 weights in inference" if weights else "bf16 autocast", "fp32, no autocast")[
        facts["precision"] != "bf16"
    ]
    mode = f"{facts['mode']} mode" if facts["enabled"] else "not enabled; balanced mode would be"
    return f"apt-transformer {__version__}: {mode}, {precision} (this {_noun(facts)} multiplies bf16 {native})"


def rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each row, from what `facts.gather` found."""
    flash, vendors = facts["gpu_flash"], facts["multi_vendor_backend"]
    bound = f"{_noun(facts)}'s {gibibytes(facts['accelerator']['total_memory'])}"
    kernels = ", ".join(flash["kernels"]) or "none"
    return [
        ("accelerator", _accelerator(facts["accelerator"])),
        (
            "GPU Flash",
            f"attention: torch's {flash['attention']}, kernels switched on: {kernels}; FP4 weights: "
            + _present(flash["fp4_weights"]),
        ),
        ("VGPU stack", _present(facts["vgpu_stack"])),
        ("multi-vendor backend", _standings(vendors)),
        ("cloud NPU", _cloud(facts["cloud_npu"]["configured"])),
        ("left spin", "on in a model whose configuration has use_left_spin (its default); not a matter of the mode"),
        ("expected speed-up", _speed_up(facts["expected_speed_up"])),
        (
            "virtual memory",
            f"{_present(facts['virtual_memory'])} (VGPUStack); else what fits is bound by the {bound}; "
            + _rates(facts["measured"]),
        ),
    ]


def _speed_up(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NOT_MEASURED
    rows = ", ".join(
        f"{'not measured' if ratio is None else f'{ratio:.2g} times'} at {count} row{'' if count == 1 else 's'}"
        for count, ratio in found["by_rows"]
    )
    out_features, in_features = found["layer"]
    return f"a {found['format']} layer of {out_features} x {in_features} over a plain one, measured: {rows}"


def _rates(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"link and disk: {NOT_MEASURED}"
    words = {"link": found["link_gbps"], "disk": found["disk_gbps"]}
    return ", ".join(f"{name} {'none' if rate is None else f'{rate:.1f} GB/s'}" for name, rate in words.items())


def show(facts: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Write the banner to `stream` (None: stderr): a table on a terminal, plain ASCII elsewhere."""
    stream = stream or sys.stderr
    if stream.isatty():
        _show_table(title(facts), rows(facts), stream)
        return
    found = rows(facts)
    width = max(len(name) for name, _ in found)
    lines = [title(facts), *(f"  {name:<{width}}  {text}" for name, text in found)]
    stream.write("".join(f"{line.encode('ascii', 'replace').decode('ascii')}\n" for line in lines))
    stream.flush()


def _show_table(heading: str, lines: list[tuple[str, str]], stream: TextIO) -> None:
    # rich takes a tenth of a second to load, which only a terminal has a use for.
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=Text(heading), title_justify="left", show_header=False)
    for name, text in lines:
        table.add_row(Text(name, style="bold"), Text(text))
    Console(file=stream).print(table)


def _noun(facts: Mapping[str, Any]) -> str:
    kind = facts["accelerator"]["type"]
    return {"cuda": "GPU", "xpu": "GPU"}.get(kind, kind.upper())


def _standings(vendors: Mapping[str, str]) -> str:
    """The vendors by what their tests ran on."""
    names = dict.fromkeys(vendors.values())
    return "; ".join(
        f"{standing}: {', '.join(kind for kind, its in vendors.items() if its == standing)}" for standing in names
    )


def _cloud(configured: list[str]) -> str:
    return f"available; connected: {', '.join(configured) or 'none (enable_cloud_npu)'}"


def _present(there: bool) -> str:
    return "available" if there else ABSENT


def _accelerator(found: Mapping[str, Any]) -> str:
    free = "unknown" if found["free_memory"] is None else gibibytes(found["free_memory"])
    text = f"{found['device']}: {found['name']}, {gibibytes(found['total_memory'])} memory, {free} free"
    reason = f"; no accelerator in use: {found['without_accelerator']}" if found["type"] == "cpu" else ""
    return f"{text}, torch {found['torch']}{reason}"
