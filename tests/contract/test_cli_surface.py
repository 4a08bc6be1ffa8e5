"""The command line's options are a list in a file, and asking for help loads nothing heavy.

After a change on purpose: python tests/contract/test_cli_surface.py > tests/contract/cli_surface.txt
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apt_model.cli.main import COMMANDS, main
from apt_model.cli.options import flags

SURFACE = Path(__file__).parent / "cli_surface.txt"
HEADING = "# Every option of every command, made by: python tests/contract/test_cli_surface.py"


def surface() -> str:
    lines = [HEADING]
    for name, (module, _) in COMMANDS.items():
        lines += ["", f"apt-model {name}", *sorted(flags(importlib.import_module(module).Options))]
    return "\n".join(lines) + "\n"


def test_no_option_comes_or_goes_unnoticed():
    assert surface() == SURFACE.read_text(encoding="utf-8"), __doc__


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_is_what_help_shows(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    shown = re.findall(r"^ {2}(--[a-z]\S*?)(?:, (--\S+))?(?: |$)", capsys.readouterr().out, flags=re.MULTILINE)
    options = {flag for pair in shown for flag in pair if flag}
    assert options == set(flags(importlib.import_module(COMMANDS[command][0]).Options))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_options_of_all(command):
    assert {"--format", "--quiet", "--debug"} <= set(flags(importlib.import_module(COMMANDS[command][0]).Options))


def _loaded(*args):
    """Which packages a call of `main` leaves loaded, in a process of its own."""
    code = (
        f"import sys; from apt_model.cli.main import main; main({list(args)!r}); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize("args", [["--help"], [], ["--version"], ["--explain", "APT-E010"], ["trian"]], ids=" ".join)
def test_help_loads_neither_torch_nor_tyro_nor_rich(args):
    assert not {"torch", "tyro", "rich", "numpy", "tokenizers"} & _loaded(*args)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_loads_no_torch(command):
    assert not {"torch", "rich", "numpy", "tokenizers"} & _loaded(command, "--help")


def test_a_refused_option_loads_no_torch():
    assert "torch" not in _loaded("train", "--stepz", "3")


if __name__ == "__main__":
    sys.stdout.write(surface())
