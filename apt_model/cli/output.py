"""What a command prints: tables and text for people, one object for programs, errors in a few lines.

Tables are drawn by rich on a terminal and in plain ASCII elsewhere. Loading this module loads neither rich nor json.
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from apt_model.core.errors import AptError

_LABEL = 10  # columns before the text of an error's line


def write(text: str, stream: TextIO | None = None) -> None:
    """Write `text` as it is; characters that the stream cannot hold are escaped."""
    stream = stream or sys.stdout
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def write_text(text: str) -> None:
    """Text that a model made, as it is; on a terminal its control characters are shown instead of obeyed."""
    if sys.stdout.isatty():
        shown = (ascii(letter)[1:-1] if _is_control(letter) and letter not in "\n\t" else letter for letter in text)
        text = "".join(shown)
    write(text + "\n")


def as_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """The object as a text with a line break; numbers that JSON cannot hold become null."""
    import json  # noqa: PLC0415 - not for --help

    return json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, indent=indent) + "\n"


def write_json(values: Mapping[str, Any]) -> None:
    """One object on the standard output."""
    write(as_json(values))


def write_as(form: str, values: Mapping[str, Any], text: str) -> None:
    """The object or the text, as --format asks."""
    if form == "json":
        write_json(values)
    else:
        write(text)


def write_error(error: AptError, form: str) -> None:
    """The error as lines on the standard error, or as an object on the standard output."""
    if form == "json":
        told = {"code": error.code, "message": error.message, "state": error.state, "remedy": error.remedy}
        write_json({"error": {**told, "exit_code": error.exit_code}})
        return
    rows = [(error.code, error.message), ("now", error.state), ("remedy", error.remedy)]
    rows.append(("more", f"apt-model --explain {error.code}"))
    indented = "\n" + " " * _LABEL
    sys.stdout.flush()
    write("".join(f"{name:<{_LABEL}}{text.replace(chr(10), indented)}\n" for name, text in rows if text), sys.stderr)


def write_facts(facts: Sequence[tuple[str, str]], title: str = "") -> None:
    """Names and what is to be said of each, one a line."""
    write(f"{title}\n" if title else "")
    if sys.stdout.isatty():
        _draw(None, facts)
        return
    width = max(len(name) for name, _ in facts)
    write("".join(f"  {name:<{width}}  {text}\n" for name, text in facts))


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table of figures: the first column names the row, the others stand to the right."""
    write(f"{title}\n" if title else "")
    if sys.stdout.isatty():
        _draw(header, rows)
        return
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        figures = "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        write(f"  {row[0]:<{widths[0]}}  {figures}".rstrip() + "\n")


def write_hints(*commands: str) -> None:
    """The next useful commands."""
    for label, command in zip(["next", *[""] * len(commands)], commands, strict=False):
        write(f"{label:<{_LABEL}}{command}\n")


def generate_hint(run: str, task: str) -> str:
    """A command that makes a run's model write something."""
    prompt = "def area(width, height): return width * height" if task == "seq2seq" else "def "
    return f"apt-model generate {shlex.quote(run)} --prompt {shlex.quote(prompt)}"


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def figure(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _is_control(letter: str) -> bool:
    return letter < " " or "\x7f" <= letter < "\xa0"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    # rich takes a tenth of a second to load, which only a terminal has a use for.
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(show_header=header is not None)
    for number in range(len(rows[0])):
        right = header is not None and number > 0
        table.add_column(header[number] if header else "", justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(Text(row[0], style="bold"), *(Text(cell) for cell in row[1:]))
    Console().print(table)
