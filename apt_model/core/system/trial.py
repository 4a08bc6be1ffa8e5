"""A vendor's package, imported and asked in a process of its own, which may hang or crash without us. No torch."""

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from apt_model.core.system.presence import Presence

# What the process runs: the path to look on, the package and the device type are its arguments, the last its result.
# Each rung is written down before the next is tried, so that what a crash leaves says how far it came.
_CODE = """
import json, sys
path, package, kind, result = sys.argv[1:]
sys.path[:] = json.loads(path)
def say(**found):
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)
try:
    import importlib
    importlib.import_module(package)
    import torch
    module = torch.get_device_module(kind)
except BaseException as error:
    say(why=f"{type(error).__name__}: {error}")
    sys.exit()
say(loads=True)
try:
    available = bool(module.is_available())
    say(loads=True, available=available, count=int(module.device_count()) if available else 0)
except BaseException as error:
    say(loads=True, why=f"{type(error).__name__}: {error}")
"""


def is_installed(package: str) -> bool:
    """Whether there is a package of this dotted name to import; nothing is imported, its parents neither."""
    first, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(first)
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return False
            first = f"{first}.{part}"
            spec = importlib.machinery.PathFinder.find_spec(first, spec.submodule_search_locations)
    except (ImportError, ValueError):  # a module without a spec, as somebody puts into sys.modules
        return first in sys.modules
    return spec is not None


def try_package(package: str, kind: str, seconds: float) -> Presence:
    """How far `package` comes in another process, in which it is given `seconds`; it has to be installed."""
    with tempfile.TemporaryDirectory(prefix="apt-device-") as folder:
        result = Path(folder) / "found.json"
        ended = _run([json.dumps(sys.path), package, kind, str(result)], seconds)
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(result.read_text(encoding="utf-8"))
    why = found.pop("why", "") or ended
    return Presence(installed=True, **found, why=why)


def _run(arguments: list[str], seconds: float) -> str:
    """Run the code to its end or for `seconds`; what was wrong with how it ended, or nothing."""
    # torch's own loading of packages would hide the cause; this one is imported by its name.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603 - this interpreter and our own code
            [sys.executable, "-c", _CODE, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"it did not answer in {seconds:g} s"
        if code == 0:
            return ""
        said.seek(0)
        lines = said.read().decode("utf-8", "replace").strip().splitlines()
    how = f"the process that tried it ended with {_name(code)}"
    return f"{how}: {lines[-1]}" if lines else how


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill it and what it started; one that even then does not end is left alone."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
    if process.returncode is None:
        process.returncode = -signal.SIGKILL  # the driver holds it: nobody waits for that


def _name(code: int) -> str:
    """An exit status in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"status {code}"
