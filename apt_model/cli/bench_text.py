"""What `apt-model bench` prints for people."""

from collections.abc import Sequence

from apt_model.cli import output
from apt_model.optimization.bench.rows import Row
from apt_model.optimization.bench.run import Report

_TITLES = {
    "linear": "linear layers, [out x in] and rows of input",
    "attention": "causal attention, [batch x heads x positions x width]",
    "link": "link",
    "disk": "disk",
}


def tell(report: Report) -> None:
    """The machine, the ceilings, and a table a part."""
    output.write_facts(_machine(report))
    output.write_table(
        ("ceiling", "rate", "unit"),
        [(name, figure(each.rate), each.unit) for name, each in report.ceilings.items() if each.rate is not None],
        "\nceilings, measured in this run",
    )
    output.write_facts([(name, each.how if each.why is None else f"not measured: {each.why} ({each.how})")
                        for name, each in report.ceilings.items()], "\nwhat they are")  # fmt: skip
    for part, title in _TITLES.items():
        rows = [row for row in report.rows if row.part == part]
        timed = [row for row in rows if row.seconds is not None]
        if timed:
            output.write_table(_header(timed), [_cells(row, timed) for row in timed], f"\n{title}")
        missing = [row for row in rows if row.seconds is None]
        if missing:
            output.write_facts([(_name(row), row.why or "") for row in missing], "" if timed else f"\n{title}")
    if report.small:
        output.write("\nmeasured with --small: these figures say nothing of the machine\n")


def _machine(report: Report) -> list[tuple[str, str]]:
    found, device = report.machine, report.machine["device"]
    driver = f", driver {found['driver']}" if found["driver"] else ""
    triton = f", triton {found['triton']}" if found["triton"] else ""
    commit = f", commit {found['commit'][:10]}" if found["commit"] else ""
    return [
        ("device", f"{device['type']}: {device['name']}, {output.size(device['memory_bytes'])}{driver}"),
        ("host", f"{found['processor']}, {found['cores']} cores, {found['threads']} threads"),
        (
            "software",
            f"apt-model {found['apt_model']}{commit}, torch {found['torch']}{triton}, python {found['python']}",
        ),
        ("measured", f"{found['date']}, in {report.seconds:.1f} s"),
    ]


def _header(rows: Sequence[Row]) -> tuple[str, ...]:
    """With a column of speed-ups where a row has one."""
    return ("", "time", "rate", "of ceiling", "", *(["over peer"] if _compared(rows) else []))


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    rate = f"{figure(row.rate)} {row.unit}" if row.rate is not None else "-"
    share = percent(row.share) if row.share is not None else "-"
    over = f"{row.speed_up:.2f}x" if row.speed_up is not None else ""
    cells = (_name(row), _time(row.seconds), rate, share, row.ceiling or "")
    return (*cells, *([over] if _compared(rows) else []))


def _compared(rows: Sequence[Row]) -> bool:
    return any(row.speed_up is not None for row in rows)


def _name(row: Row) -> str:
    if row.part == "linear" and row.rows is not None:
        return f"{row.shape}, {row.rows:,} row{'s'[: row.rows > 1]}, {row.what}"
    return f"{row.shape}, {row.what}" if row.shape else row.what


def figure(rate: float) -> str:
    """Three digits or more, and no powers of ten."""
    return f"{rate:,.0f}" if rate >= 999.5 else f"{rate:.3g}"


def percent(share: float) -> str:
    """A share for people, with a digit more where it is small."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"
