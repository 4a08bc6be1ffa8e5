"""The command `apt-model`: finds the command asked for, and says in four lines what went wrong.

This module loads neither torch nor tyro nor rich; each command loads what it needs.
"""

import importlib
import itertools
import os
import sys
import traceback
from collections.abc import Sequence

from apt_model import __version__
from apt_model.cli import output
from apt_model.core.errors import AptError, ConfigError, InterruptedRun

COMMANDS = {
    "train": ("apt_model.cli.train", "train a model, or go on with a run"),
    "generate": ("apt_model.cli.generate", "continue a text, or write the target of a source"),
    "eval": ("apt_model.cli.evaluate", "score held-out text, beside gzip and xz and beside the plain twin"),
    "quantize": ("apt_model.cli.quantize", "turn a saved model's weights into 4-bit floating point"),
    "plan": ("apt_model.cli.plan", "what of a model would live where in GPU, RAM and SSD, and how fast that is"),
    "serve": ("apt_model.cli.serve", "hold weights, and compute with them for others over HTTP"),
    "cloud": ("apt_model.cli.cloud", "accelerators elsewhere: which are set up, push weights, a round trip, chat"),
    "doctor": ("apt_model.cli.doctor", "what is broken on this machine, tried and not believed, and what to do"),
    "bench": ("apt_model.cli.bench", "how fast this machine is, beside the ceilings of what bounds it"),
    "info": ("apt_model.cli.info", "this version, this machine, and the size of a model"),
}
_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
_HELP = """\
Train, run and measure APT transformers: left spin, autopoietic attention, DBC-DAC gradients.

usage: apt-model COMMAND [OPTIONS]

{commands}

  apt-model COMMAND --help   the options of a command, with their defaults
  apt-model --explain CODE   what an error code means, and what to do
  apt-model --version

With every command:
  --format human|json        tables and text, or one JSON object on the standard output
  --quiet                    no progress and no hints
  --debug                    the traceback of an error (also APT_DEBUG=1)

Start:  make demo  |  apt-model train --preset tiny --out runs/tiny
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (None: the process's own arguments); returns the exit code and raises nothing."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            code = _dispatch(args)
            sys.stdout.flush()
        except SystemExit as leaving:  # tyro leaves so after a command's --help
            code = leaving.code if isinstance(leaving.code, int) else 0
        except BrokenPipeError:
            raise
        except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001 - nobody should meet a traceback unasked
            code = _report(raised, args)
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
        code = _BROKEN_PIPE
    return code


def _dispatch(args: list[str]) -> int:
    at = 0
    while at < len(args) and args[at].startswith("-"):
        word, _, value = args[at].partition("=")
        if word in ("-h", "--help"):
            output.write(_help())
            return 0
        if word == "--version":
            output.write_as(_format(args), {"version": __version__}, f"apt-model {__version__}\n")
            return 0
        if word == "--explain":
            _explain(value or (args[at + 1] if at + 1 < len(args) else ""), _format(args))
            return 0
        if word not in ("--format", "--quiet", "--debug"):
            raise _unknown("option", word, ["--help", "--version", "--explain", "--format", "--quiet", "--debug"])
        at += 2 if word == "--format" and not value else 1
    if at >= len(args):
        output.write(_help())
        return ConfigError.exit_code
    name = args[at]
    if name not in COMMANDS:
        raise _unknown("command", name, list(COMMANDS))
    code: int | None = importlib.import_module(COMMANDS[name][0]).run([*args[:at], *args[at + 1 :]])
    return code or 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {help_}" for name, (_, help_) in COMMANDS.items())
    return _HELP.format(commands="\n".join(lines))


def _explain(code: str, form: str) -> None:
    import textwrap  # noqa: PLC0415 - only here

    from apt_model.cli.explain import explain  # noqa: PLC0415

    meanings = explain(code)
    lines = []
    for row in meanings:
        lines.append(f"{row['code']}  {row['error']}, exit code {row['exit_code']}")
        for text in (row["meaning"], row["advice"]):
            lines += textwrap.wrap(text, width=100, initial_indent="  ", subsequent_indent="  ")
    output.write_as(form, {"codes": meanings}, "\n".join(lines) + "\n")


def _unknown(kind: str, name: str, known: list[str]) -> ConfigError:
    import difflib  # noqa: PLC0415 - only for a mistake

    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return ConfigError(f"apt-model has no {kind} {name!r}", remedy=remedy)


def _format(args: Sequence[str]) -> str:
    """What --format says, also where the rest of the arguments cannot be parsed."""
    as_json = "--format=json" in args or ("--format", "json") in itertools.pairwise(args)
    return "json" if as_json else "human"


def _report(raised: BaseException, args: Sequence[str]) -> int:
    from apt_model.core import env  # noqa: PLC0415 - only for an error

    if "--debug" in args or env.DEBUG.get():
        traceback.print_exception(raised)
    error = _as_ours(raised)
    output.write_error(error, _format(args))
    return error.exit_code


def _as_ours(raised: BaseException) -> AptError:
    """What to tell of an exception: our own as they are, the system's in its words, the rest as our mistake."""
    if isinstance(raised, AptError):
        return raised
    if isinstance(raised, KeyboardInterrupt):
        return InterruptedRun("stopped from the keyboard", state="checkpoints written before are whole")
    kind, words = type(raised).__name__, " ".join(str(raised).split())
    if kind in ("OutOfMemoryError", "MemoryError"):
        return AptError(
            f"out of memory: {words}"[:400],
            remedy="a smaller --batch-size (in training with --grad-accumulation to match), or a smaller model",
        )
    if isinstance(raised, OSError):
        return AptError(f"the system refused: {words}", remedy="run it again with --debug to see where")
    return AptError(
        f"this is our mistake, not yours: {kind}: {words}"[:400],
        remedy="run it again with --debug, and send us the traceback",
    )


def _close_stdout() -> None:
    """The reader has gone: what is still in Python's buffer must not complain when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
