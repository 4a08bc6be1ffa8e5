"""A process that is killed while it writes to a store leaves what was flushed, whole, and nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from apt_model.vgpu.disk import DiskStore

ROOT = Path(__file__).parents[2]
CHUNK, SIZE, CAPACITY = 8192, 40_001, 1 << 24
FLUSHED = {f"k{i}": i for i in range(5)}
# What the processes have in common: a store with five blobs that are flushed.
BEGIN = f"""
import os, sys, time
from pathlib import Path
import torch
from apt_model.vgpu import disk
store = disk.DiskStore(Path(sys.argv[1]), {CAPACITY}, threads=2, chunk={CHUNK})
for i in range(5):
    store.write(f"k{{i}}", torch.full(({SIZE},), i, dtype=torch.uint8))
store.flush()

def stop(*_):
    os.write(1, b"here\\n")  # in one: two threads may come here
    time.sleep(600)
"""
KILLED = {
    "somewhere in many writes": "print('here', flush=True)\n"
    "while True:\n    for i in range(9):\n        store.write(f'new{i}', torch.zeros(400_000, dtype=torch.uint8))",
    "in the middle of a write": "whole = disk.DirectFile.write\n"
    "disk.DirectFile.write = lambda file, view, at: stop() if at else whole(file, view, at)\n"
    f"store.write('new', torch.zeros({SIZE}, dtype=torch.uint8))",
    "after a write, before its flush": f"store.write('new', torch.zeros({SIZE}, dtype=torch.uint8))\nstop()",
    "between the blobs and the index": f"store.write('new', torch.zeros({SIZE}, dtype=torch.uint8))\n"
    "disk.write_index = stop\nstore.flush()",
    "before the index has its name": f"store.write('new', torch.zeros({SIZE}, dtype=torch.uint8))\n"
    "Path.replace = stop\nstore.flush()",
}


@pytest.mark.parametrize("moment", KILLED)
def test_what_was_flushed_is_there_and_what_was_not_is_gone(tmp_path, moment):
    folder = tmp_path / "store"
    command = [sys.executable, "-c", BEGIN + KILLED[moment], folder]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        if moment == "somewhere in many writes":
            time.sleep(0.2)
        left = len(list(folder.glob("*.blob"))) + len(list(folder.glob(".partial-*")))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert line == "here\n"
    assert left > len(FLUSHED) or moment == "somewhere in many writes"
    with DiskStore(folder, CAPACITY) as store:
        assert set(store) == FLUSHED.keys()
        store.verify()
        for key, value in FLUSHED.items():
            out = torch.empty(SIZE, dtype=torch.uint8)
            store.read(key, out)
            assert (out == value).all()
        assert len(list(folder.glob("*.blob"))) == len(FLUSHED)
        assert {path.name for path in folder.iterdir() if path.suffix != ".blob"} == {"index.json", "lock"}
        assert store.used == sum(path.stat().st_size for path in folder.glob("*.blob"))
        store.write("new", torch.ones(7, dtype=torch.uint8))
    with DiskStore(folder, CAPACITY) as store:
        assert set(store) == {*FLUSHED, "new"}
