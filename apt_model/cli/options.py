"""A command's options: a keyword-only dataclass, parsed by tyro; what cannot be parsed is refused in our own words."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import tyro

from apt_model.core.errors import AptError, ConfigError

T = TypeVar("T")

FLAT = tyro.conf.arg(name="")
"""On a field that is a dataclass: its options stand among the command's own, without a prefix."""
_FRAME = " │|"
_PLAIN = str.maketrans("─│╭╮╰╯", "-     ")


@dataclass(frozen=True, kw_only=True)
class GlobalOptions:
    """What every command takes."""

    format: Literal["human", "json"] = "human"
    """Tables and text, or one JSON object on the standard output."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no hints."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


def parse(cls: type[T], args: Sequence[str], command: str, *, default: T | None = None) -> T:
    """Make `cls` from `args`; what is not said comes from `default`.

    Raises `ConfigError` for what cannot be parsed, and what `cls` itself raises; leaves the process after --help.
    """
    try:
        options, rest = _ask_tyro(cls, args, command, {} if default is None else {"default": default})
    except ConfigError as error:
        raise _as_option(error, cls) from error
    if rest:
        raise _unexpected(rest, cls, args, command)
    return options


def parse_some(cls: type[T], args: Sequence[str], command: str) -> T:
    """Make `cls` from those of `args` that it knows."""
    return _ask_tyro(cls, args, command, {"add_help": False})[0]


def flags(cls: type[Any], prefix: str = "") -> dict[str, bool]:
    """Every option of `cls` in the command line's spelling, and whether it is a switch."""
    found: dict[str, bool] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, marks = hints[field.name], getattr(hints[field.name], "__metadata__", ())
        kind = typing.get_args(hint)[0] if marks else hint
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            found |= flags(typing.cast("type[Any]", kind), prefix if FLAT in marks else f"{prefix}{name}.")
        elif tyro.conf.Positional not in marks:
            found[f"--{prefix}{name}"] = kind is bool
            if kind is bool and tyro.conf.FlagCreatePairsOff not in marks:
                found[f"--{prefix}no-{name}"] = True
    return found


def _ask_tyro(cls: type[T], args: Sequence[str], command: str, extra: dict[str, Any]) -> tuple[T, list[str]]:
    told, complaint = io.StringIO(), io.StringIO()
    # A terminal gets tyro's help with its frames and colours; a pipe gets plain ASCII.
    shows_help = sys.stdout.isatty() and not {"-h", "--help"}.isdisjoint(args)
    try:
        with (
            contextlib.redirect_stderr(complaint),
            contextlib.nullcontext() if shows_help else contextlib.redirect_stdout(told),
        ):
            return tyro.cli(cls, args=args, prog=f"apt-model {command}", return_unknown_args=True, **extra)
    except SystemExit as leaving:
        if not leaving.code:
            sys.stdout.write(told.getvalue().translate(_PLAIN))
            raise
        _refuse(leaving, complaint.getvalue(), cls, args, command)


def _refuse(leaving: SystemExit, complaint: str, cls: type[Any], args: Sequence[str], command: str) -> NoReturn:
    cause: BaseException | None = leaving
    while cause is not None:  # tyro tells a dataclass's own refusal in a frame; the error itself knows the remedy
        if isinstance(cause, AptError):
            raise cause from None
        cause = cause.__cause__ or cause.__context__
    known = flags(cls)
    unknown = [word for word in args if word.startswith("--") and _bare(word) not in {*known, "--help"}]
    if unknown:  # tyro speaks first of what is missing, which often is what was misspelled
        raise _unexpected(unknown, cls, args, command) from None
    lines = [line.strip(_FRAME) for line in complaint.splitlines()]
    raise ConfigError(
        _misread(lines, args) or _missing(lines) or _in_one_line(lines), remedy=f"{_help(command)} lists what it takes"
    ) from None


def _unexpected(rest: Sequence[str], cls: type[Any], args: Sequence[str], command: str) -> ConfigError:
    known = flags(cls)
    option = next((word for word in rest if word.startswith("-") and word != "-"), None)
    if option is not None:
        near = _nearest(_bare(option), list(known))
        remedy = f"did you mean {near}?" if near else f"{_help(command)} lists what it takes"
        return ConfigError(f"apt-model {command} has no option {option}", remedy=remedy)
    word = rest[0]
    before = _bare(args[max(args.index(word) - 1, 0)]) if word in args else ""
    if known.get(before):
        opposite = next((flag for flag in known if flag != before and _root(flag) == _root(before)), None)
        return ConfigError(
            f"apt-model {command}: unexpected {word!r} after {before}, which takes no value",
            remedy=f"leave it out; the opposite is {opposite}" if opposite else "leave it out",
        )
    return ConfigError(
        f"apt-model {command}: unexpected {word!r}", remedy="a text of more than one word stands in quotes"
    )


def _nearest(option: str, known: list[str]) -> str | None:
    """The option whose last part is the same ('--lr' for '--optimizer.lr'), else the one spelled most like it."""
    last = option.lstrip("-").rpartition(".")[2]
    same = [flag for flag in known if flag.lstrip("-").rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(option, known, n=1)
    return near[0] if near else None


def _bare(word: str) -> str:
    """An option without its value, in the spelling of `flags`."""
    return word.partition("=")[0].replace("_", "-")


def _root(flag: str) -> str:
    return re.sub(r"(^--|\.)no-", r"\1", flag)


def _as_option(error: ConfigError, cls: type[Any]) -> ConfigError:
    """The same error, with the option's name where it names a field: '--model.d-model' for 'APTModelConfiguration'."""
    owner, dot, rest = error.message.partition(".")
    name, colon, expected = rest.partition(":")
    prefix = _prefixes(cls).get(owner)
    if prefix is None or not (dot and colon):
        return error
    message = f"--{prefix}{name.replace('_', '-')}:{expected}"
    return ConfigError(message, state=error.state, remedy=error.remedy)


def _prefixes(cls: type[Any], prefix: str = "") -> dict[str, str]:
    """The prefix under which the options of each dataclass in `cls` stand, by its name."""
    found = {cls.__name__: prefix}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        kind = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(kind):
            inner = prefix if FLAT in marks else f"{prefix}{name.replace('_', '-')}."
            found |= _prefixes(typing.cast("type[Any]", kind), inner)
    return found


def _misread(lines: Sequence[str], args: Sequence[str]) -> str | None:
    """A value of the wrong type: what the option takes stands in its help, which tyro shows below the complaint."""
    match = re.match(r"Error parsing (--[\w.-]+)[^:]*:", next((line for line in lines if "Error parsing" in line), ""))
    takes = next(
        (line.split()[-1] for line in lines if match and re.match(rf"{re.escape(match[1])}\b[^:]*$", line)), None
    )
    if match is None or takes is None:
        return None
    given = [
        word.partition("=")[2] if "=" in word else "".join(args[at + 1 : at + 2])
        for at, word in enumerate(args)
        if _bare(word) == match[1]
    ]
    return f"{match[1]}: expected {takes}, got {given[-1]!r}" if given else None


def _missing(lines: Sequence[str]) -> str | None:
    """Required options, without their help."""
    if not any(line.startswith("Missing from") for line in lines):
        return None
    names = [line for line in lines if re.fullmatch(r"--[\w.-]+ \S+|[A-Z]+", line)]
    return f"missing: {', '.join(names)}" if names else None


def _in_one_line(lines: Sequence[str]) -> str:
    """What stands in tyro's frame above its first rule, or below it when its title is ruled off."""
    title, *rest = (line for line in lines if line)
    body: list[str] = []
    for line in rest:
        if line.strip("-─╭╮╰╯ "):
            body.append(line)
        elif body:
            break
    return " ".join(body) or title


def _help(command: str) -> str:
    return f"apt-model {command} --help"
