"""What a child process of the doctor tries: run as `python probe.py NAME OPTIONS`, and tells a line of JSON a stage.

What hangs, is killed or prints is this process's affair. Before a stage begins its name is told, so that the parent
knows where it ended. The standard output of everything that is imported goes to the standard error. On SIGUSR1 the
stack is written to the standard error.
"""

import contextlib
import errno
import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_PATIENT, _IMPATIENT = 10.0, 1.2
"""Seconds without any work after which a stage hangs: drivers sleep while they start a device, imports do not."""
_MIB = 2**20
_SIDE = 32
"""Of the matrices: sums of products of whole numbers under 7, exact in every type of 10 bits and more."""
_FILE, _SECONDS = 64 * _MIB, 0.12
"""Most bytes that are written to try a disk, and most time for each direction."""
_LOCKING = 0.6
"""Seconds in which memory is locked, or pinned, piece by piece."""

Tell = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def stage(tell: Tell, name: str, patience: float = _IMPATIENT) -> Iterator[dict[str, Any]]:
    """Tell that `name` begins, and what came of it: what the body puts into the dict, or its error."""
    tell({"begins": name, "patience": patience})
    began = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        yield found
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken package may raise anything
        found["error"] = chain(error)
    tell({"stage": name, "seconds": time.perf_counter() - began, **found})


def chain(error: BaseException | None) -> list[str]:
    """The error and what caused it, the outermost first."""
    words: list[str] = []
    while error is not None and len(words) < 10:
        words.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:600])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return words


def probe_torch(tell: Tell, options: dict[str, Any]) -> None:
    """Import torch, load its backends, and compute on the best device."""
    with stage(tell, "import torch") as found:
        import torch  # noqa: PLC0415 - here it is tried

        found["version"] = str(torch.__version__)
    if "error" in found:
        return
    for package, name, value in options["backends"]:
        with stage(tell, f"backend {name}") as found:
            found["package"], found["name"] = package, name
            module, _, place = value.partition(":")
            load: Any = importlib.import_module(module)
            for part in filter(None, place.split(".")):
                load = getattr(load, part)
            load()
    _adopt(options["package"])
    with stage(tell, "numpy") as found, warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        if importlib.util.find_spec("numpy") is not None:
            torch.ones(2).numpy()
    with stage(tell, "device", _PATIENT) as found:
        _device(found, options["asked"])
    if "error" not in found:
        kind = found["kind"]
        with stage(tell, "kernel", _PATIENT) as found:
            _matmul(found, kind)
        if kind == "cuda":
            with stage(tell, "pinned", _PATIENT) as found:
                _pin(found, options["bound"])
            with stage(tell, "triton", _PATIENT) as found:
                _triton(found)


def _adopt(folder: str) -> None:
    """Make `apt_model` the one that the parent runs, wherever it lies."""
    spec = importlib.util.spec_from_file_location(
        "apt_model", Path(folder) / "__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["apt_model"] = module
    spec.loader.exec_module(module)


def _device(found: dict[str, Any], asked: str | None) -> None:
    from apt_model.core.errors import AptError  # noqa: PLC0415
    from apt_model.core.system import get_device_manager  # noqa: PLC0415
    from apt_model.core.system.cuda import CudaDevice  # noqa: PLC0415

    if asked:
        try:
            get_device_manager(asked)
        except AptError as error:
            found["asked"] = error.message
    # Asked for itself, as it starts the driver and not only its management library; what is wrong, torch warns of.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        presence = CudaDevice.presence()
    why = "; ".join(str(warning.message) for warning in said) or presence.why
    found["cuda"] = {"built": presence.installed, "count": presence.count, "why": why}
    manager = get_device_manager("cuda" if presence.usable else "cpu")
    found["kind"], found["name"] = manager.get_accelerator_type(), manager.name()
    found["memory"], found["free"] = manager.total_memory(), manager.free_memory()


def _matmul(found: dict[str, Any], kind: str) -> None:
    import torch  # noqa: PLC0415

    from apt_model.core.system import get_device_manager  # noqa: PLC0415

    side = range(_SIDE)
    left = [[(3 * i + 5 * j) % 7 for j in side] for i in side]
    right = [[(2 * i + 3 * j) % 5 for j in side] for i in side]
    expected = [[sum(row[k] * right[k][j] for k in side) for j in side] for row in left]
    a, b = (torch.tensor(matrix, dtype=torch.float32, device=kind) for matrix in (left, right))
    result = (a @ b).tolist()
    manager, began = get_device_manager(kind), time.perf_counter()
    torch.mm(a, b)
    manager.synchronize()
    found["warm"] = time.perf_counter() - began
    wrong = sum(x != y for rows in zip(result, expected, strict=True) for x, y in zip(*rows, strict=True))
    found["wrong"], found["of"] = wrong, _SIDE**2


def _triton(found: dict[str, Any]) -> None:
    """A kernel of ours against its definition."""
    import torch  # noqa: PLC0415

    from apt_model.ops.left_spin import fused, naive, select  # noqa: PLC0415

    with torch.no_grad():
        u, delta = torch.linspace(-1, 1, 1024, device="cuda").view(2, 16, 32).unbind()
        found["made"] = fused.applies(u, delta, detach=True)
        if found["made"]:
            made = select.guard_step(u, delta, alpha=0.5, tau=0.3)
            error = (made - naive.guard_step(u, delta, alpha=0.5, tau=0.3)).abs().max().item()
            found["error_of_result"], found["wrong"] = error, not error < 1e-4


def _pin(found: dict[str, Any], bound: int) -> None:
    from apt_model.core.errors import DeviceError  # noqa: PLC0415
    from apt_model.core.system import get_device_manager  # noqa: PLC0415

    manager = get_device_manager("cuda")

    def take(address: int, nbytes: int) -> str:
        try:
            manager.register_host(address, nbytes)
        except DeviceError as error:
            return error.message
        return ""

    _until_refused(found, bound, take, lambda address, _: manager.unregister_host(address))


def probe_lock(tell: Tell, options: dict[str, Any]) -> None:
    """Lock memory until the system refuses."""
    import ctypes  # noqa: PLC0415

    with stage(tell, "lock") as found:
        library = ctypes.CDLL(None, use_errno=True)
        as_c = (ctypes.c_void_p, ctypes.c_size_t)
        library.mlock.argtypes = library.munlock.argtypes = as_c

        def take(address: int, nbytes: int) -> str:
            return os.strerror(ctypes.get_errno()) if library.mlock(address, nbytes) else ""

        _until_refused(found, options["bound"], take, library.munlock)


def _until_refused(
    found: dict[str, Any], bound: int, take: Callable[[int, int], str], give: Callable[[int, int], object]
) -> None:
    """Take pieces of fresh memory up to `bound`, halving a piece that is refused; give all of them back.

    When time is up, `bound` is what was reached.
    """
    import ctypes  # noqa: PLC0415
    import mmap  # noqa: PLC0415

    held: list[tuple[int, int, Any]] = []
    piece, total, words = min(32 * _MIB, bound), 0, ""
    began = time.perf_counter()
    while total < bound and piece >= mmap.PAGESIZE:
        if time.perf_counter() - began > _LOCKING and not words:
            bound = total
            break
        memory = mmap.mmap(-1, piece)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        refusal = take(address, piece)
        if refusal:
            words, piece = refusal, piece // 2
            continue
        held.append((address, piece, memory))
        total += piece
        piece = min(piece, bound - total)
    for address, size, _ in held:
        give(address, size)
    found["bytes"], found["bound"], found["words"] = total, bound, words


def probe_imports(tell: Tell, options: dict[str, Any]) -> None:
    """Import packages with parts in C."""
    for name in options["names"]:
        with stage(tell, f"import {name}") as found:
            found["version"] = str(getattr(importlib.import_module(name), "__version__", ""))


def probe_driver(tell: Tell, options: dict[str, Any]) -> None:  # noqa: ARG001
    """Ask NVIDIA's driver itself, without torch."""
    import ctypes  # noqa: PLC0415

    with stage(tell, "driver", _PATIENT) as found:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        library.cuDriverGetVersion(ctypes.byref(number))
        found["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
        found["init"] = library.cuInit(0)
        count = ctypes.c_int()
        if not found["init"]:
            library.cuDeviceGetCount(ctypes.byref(count))
        found["count"] = count.value


def probe_disk(tell: Tell, options: dict[str, Any]) -> None:
    """Write and read a file that has no name any more once it is open."""
    import mmap  # noqa: PLC0415
    import tempfile  # noqa: PLC0415

    with stage(tell, "disk", _PATIENT) as found:
        number, name = tempfile.mkstemp(prefix=".apt-doctor-", dir=options["folder"])
        os.close(number)
        direct = getattr(os, "O_DIRECT", 0)
        try:
            try:
                file = os.open(name, os.O_RDWR | direct)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                direct, file = 0, os.open(name, os.O_RDWR)
        finally:
            Path(name).unlink()
        block = mmap.mmap(-1, 4 * _MIB)
        block.write(os.urandom(_MIB) * 4)  # a disk that compresses is not fooled
        found["direct"] = bool(direct)
        try:
            written, seconds = _timed(lambda at: os.pwrite(file, block, at), _FILE, lambda: os.fsync(file))
            found["write_gbps"] = written / seconds / 1e9
            read, seconds = _timed(lambda at: os.preadv(file, [block], at), written)
            found["read_gbps"], found["bytes"] = read / seconds / 1e9, written
        finally:
            os.close(file)


def _timed(move: Callable[[int], int], most: int, end: Callable[[], object] | None = None) -> tuple[int, float]:
    """Bytes moved until there are `most` or time is up, and the seconds that it took."""
    began, moved = time.perf_counter(), 0
    while moved < most and time.perf_counter() - began < _SECONDS:
        step = move(moved)
        if not step:
            raise OSError(errno.EIO, "nothing was moved")
        moved += step
    if end is not None:
        end()
    return moved, max(time.perf_counter() - began, 1e-9)


PROBES = {
    "torch": probe_torch,
    "lock": probe_lock,
    "imports": probe_imports,
    "driver": probe_driver,
    "disk": probe_disk,
}


def main() -> None:
    """Run the probe that the arguments name."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    sys.path[:] = options["paths"]  # the folder of this file, which Python puts in front, is no place for modules
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=False)
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as told:
        os.dup2(2, 1)

        def tell(said: dict[str, Any]) -> None:
            told.write(json.dumps(said) + "\n")
            told.flush()

        PROBES[name](tell, options)
    # Without the clean-up of libraries that may be what is broken; everything has been told.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
