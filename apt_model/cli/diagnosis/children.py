"""Child processes, all at once, each with a limit: of time, and of time in which it does nothing at all.

A process that sleeps without using the processor is told from one that is slow, so that a hang is known in seconds and
a cold disk is waited for.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

_TICK = 0.05
_LAST_WORDS = 0.15
"""Seconds that a hanging process has to write its stack."""
_KEPT = 2**20
"""Most bytes that are kept of each output."""

End = Literal["exit", "signal", "idle", "late", "absent"]


@dataclass
class Outcome:
    """What came of a child."""

    name: str
    end: End = "exit"
    code: int = 0
    seconds: float = 0.0
    out: str = ""
    err: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """What a probe told, a stage each."""
    begun: str = ""
    """The stage that it ended in, empty if it ended between two."""

    def stage(self, name: str) -> dict[str, Any]:
        """What was told of a stage, empty if it did not come to it or did not end it."""
        return next((each for each in self.stages if each["stage"] == name), {})

    @property
    def signal(self) -> str:
        """The name of the signal that killed it."""
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"

    @property
    def place(self) -> str:
        """Where in Python it was, from the stack that it wrote last."""
        stack = self.err.rpartition("most recent call first")[2]
        frames = re.findall(r'File "([^"<][^"]*)", line (\d+)', stack)
        # Python's own library only does what it was called for.
        outside = [frame for frame in frames if not re.search(r"/lib/python3\.\d+/(?!\w+-packages/)", frame[0])]
        return next((f"{file}, line {line}" for file, line in [*outside, *frames]), "")


class _Child:
    def __init__(self, name: str, process: "subprocess.Popen[bytes]", limit: float, patience: float) -> None:
        self.outcome = Outcome(name)
        self.process, self.limit, self.patience = process, limit, patience
        self.began = self.active = time.perf_counter()
        self.used = ""
        self.told = {"out": bytearray(), "err": bytearray()}
        self.open = 2
        self.asked: float | None = None  # when it was told to write its stack
        self.ended: float | None = None

    def look(self, now: float) -> None:
        """Notice work, and the end; kill what is over its limits."""
        code = self.process.poll()
        if code is not None:
            self.ended = self.ended or now
            return
        used, sleeps = _usage(self.process.pid)
        if used != self.used or not sleeps:
            self.used, self.active = used, now
        if self.asked is not None:
            if now - self.asked > _LAST_WORDS:
                self.kill()
                self.ended = now
            return
        if now - self.began > self.limit:
            self.outcome.end = "late"
        elif now - self.active > self.patience:
            self.outcome.end = "idle"
        else:
            return
        self.asked = now
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def hear(self, name: str, data: bytes) -> None:
        """Take what it wrote; a stage that begins has a patience of its own."""
        if not data:
            self.open -= 1
            return
        self.active = time.perf_counter()
        text = self.told[name]
        text += data
        del text[:-_KEPT]
        if name == "out":
            found = re.findall(rb'"patience": ([\d.]+)', data)
            if found:
                self.patience = float(found[-1])

    @property
    def done(self) -> bool:
        # A grandchild may hold a pipe open: what a process has written is there soon after its end.
        return self.ended is not None and (self.open == 0 or time.perf_counter() - self.ended > 2 * _TICK)

    def close(self) -> Outcome:
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system may hold it in a driver for ever
            self.process.wait(timeout=4 * _TICK)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        outcome, code = self.outcome, self.process.returncode
        outcome.seconds = (self.ended or time.perf_counter()) - self.began
        outcome.out, outcome.err = (self.told[name].decode("utf-8", "replace") for name in ("out", "err"))
        if outcome.end == "exit" and code is not None:
            outcome.code = code
            outcome.end = "signal" if code < 0 else "exit"
        for line in outcome.out.splitlines():
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    said = json.loads(line)
                    outcome.begun = said.get("begins", "")
                    if "stage" in said:
                        outcome.stages.append(said)
        return outcome


@final
class Children:
    """Processes that were started, and what they wrote; leaving the block ends those that still run."""

    def __init__(self) -> None:
        self._children: list[_Child] = []
        self._absent: list[Outcome] = []
        self._selector = selectors.DefaultSelector()

    def start(
        self, name: str, command: Sequence[str], environ: Mapping[str, str], *, limit: float, patience: float
    ) -> None:
        """Start `command`; it may take `limit` seconds, and `patience` of them without doing anything."""
        try:
            process = subprocess.Popen(  # noqa: S603 - our own probe, or a tool of the driver's
                list(command), env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._absent.append(Outcome(name, end="absent", err=str(error)))
            return
        child = _Child(name, process, limit, patience)
        self._children.append(child)
        for stream, pipe in (("out", process.stdout), ("err", process.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, (child, stream))

    def wait(self) -> dict[str, Outcome]:
        """Wait for all of them."""
        while not all(child.done for child in self._children):
            self._hear(_TICK)
            now = time.perf_counter()
            for child in self._children:
                if child.ended is None:
                    child.look(now)
        return {outcome.name: outcome for outcome in [*(child.close() for child in self._children), *self._absent]}

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave none behind, whatever happened."""
        for child in self._children:
            child.close()
        self._selector.close()

    def _hear(self, seconds: float) -> None:
        if not self._selector.get_map():
            time.sleep(seconds)
            return
        for key, _ in self._selector.select(seconds):
            child, stream = key.data
            try:
                data = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            child.hear(stream, data)
            if not data:
                self._selector.unregister(key.fileobj)


def _usage(pid: int) -> tuple[str, bool]:
    """What changes when a process works, and whether it sleeps; where the system does not tell, it never sleeps."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", False
    return " ".join(fields[9:15]), fields[0] in "ST"
