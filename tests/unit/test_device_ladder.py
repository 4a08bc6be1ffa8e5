"""How vendors are looked for: packages that hang, crash or lack what they need, third parties, and what is asked."""

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from apt_model.core.errors import DeviceError
from apt_model.core.system import Accelerator, Device, Presence, get_device, get_device_manager, manager
from apt_model.core.system import accelerator as accelerator_module
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.hpu import HpuDevice
from apt_model.core.system.npu import NpuDevice
from apt_model.core.system.presence import NoAnswerError, within
from apt_model.core.system.streams import NOTHING
from apt_model.core.system.trial import is_installed, try_package
from apt_model.core.system.triton_probe import triton_works
from apt_model.core.system.xpu import XpuDevice

ROOT = Path(__file__).parents[2]
TWO = Presence(installed=True, loads=True, available=True, count=2)
CACHES = (
    manager._log_once, manager.ask, manager._load, manager.third_parties, accelerator_module._found,
    accelerator_module._ask, accelerator_module._has_streams, accelerator_module._pins, torch.get_device_module,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("APT_DEVICE", raising=False)
    for cached in CACHES:
        cached.cache_clear()
    yield
    for cached in CACHES:
        cached.cache_clear()


def package(folder, name, code):
    """A package of this dotted name with this code."""
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True)
    for parent in path.relative_to(folder).parents:
        if parent != Path():
            (folder / parent / "__init__.py").touch()
    (path / "__init__.py").write_text(code)


def distribution(folder, name, group, entry):
    """What an installer writes of a package with one entry point."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


WORKS = """
import types, torch
module = types.ModuleType("torch.fake")
module.is_available = lambda: AVAILABLE
module.device_count = lambda: 3
module.init = lambda: 1 / 0
setattr(torch, "KIND", module)
print("noise on stdout")
"""


# --- every state of every vendor


def third_party(tmp_path, monkeypatch):
    """A class of another package, registered as packages do."""
    package(
        tmp_path, "other_devices",
        "from apt_model.core.system import Accelerator\n"
        "class OtherDevice(Accelerator):\n    kind = 'mtia'\n    package = 'other_devices'\n",
    )  # fmt: skip
    distribution(tmp_path, "other-devices", manager.ENTRY_POINTS, "mtia = other_devices:OtherDevice")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = manager.third_parties()
    assert issubclass(found, Device)
    return found


STATES = ("absent", "ok", "raises", "hangs")


def test_auto_neither_raises_nor_hangs_in_any_of_1024_states(tmp_path, monkeypatch, caplog):
    kinds = [*manager.ACCELERATORS, third_party(tmp_path, monkeypatch)]
    state, released, asked = {}, threading.Event(), []

    def presence(vendor):
        asked.append(vendor)
        if state[vendor] == "hangs":
            released.wait(60)
        if state[vendor] == "raises":
            raise OSError("the driver is broken")
        return TWO if state[vendor] == "ok" else Presence(installed=False, why="no driver")

    for vendor in kinds:
        monkeypatch.setattr(vendor, "presence", classmethod(presence))
        monkeypatch.setattr(vendor, "load", classmethod(lambda _: None))
        monkeypatch.setattr(vendor, "patience", 0.003)
    begin = time.monotonic()
    caplog.set_level(logging.INFO, logger="apt_model")
    for states in itertools.product(STATES, repeat=5):
        state.update(zip(kinds, states, strict=True))
        for cached in CACHES[:3]:
            cached.cache_clear()
        released.clear()
        asked.clear()
        caplog.clear()
        expected = next((vendor for vendor in kinds if state[vendor] == "ok"), CpuDevice)
        for _ in range(2):
            assert type(get_device_manager()) is expected
        assert len(asked) == len(set(asked)), "a vendor is asked once"
        (record,) = caplog.records
        for vendor in kinds[: kinds.index(expected) if expected in kinds else 5]:
            why = {"absent": "no driver", "raises": "the driver is broken", "hangs": "did not answer in 0.003 s"}
            assert f"no {vendor.kind}, " in record.getMessage()
            assert why[state[vendor]] in record.getMessage()
        released.set()
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("failure", [ImportError("no symbol"), SystemExit(3)])
def test_a_package_that_loads_elsewhere_and_not_here_does_not_count(monkeypatch, failure):
    def load(_):
        raise failure

    monkeypatch.setattr(NpuDevice, "presence", classmethod(lambda _: TWO))
    monkeypatch.setattr(NpuDevice, "load", classmethod(load))
    assert get_device() == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"installed, but it does not load: (ImportError|SystemExit)"):
        get_device("npu")


def test_a_call_that_ends_its_thread_is_an_answer():
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        within(5, lambda: sys.exit(3))
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    assert within(5, lambda: 7) == 7
    with pytest.raises(NoAnswerError, match=r"did not answer in 0\.01 s"):
        within(0.01, lambda: time.sleep(0.5))


def test_another_choice_of_torchs_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    absent = lambda vendor: TWO if vendor in (manager.CudaDevice, found["also"]) else Presence(installed=False)  # noqa: E731
    found = {"also": None}
    with caplog.at_level(logging.WARNING, logger="apt_model"):
        assert get_device_manager(probe=absent).kind == "cuda"
        assert not caplog.records  # torch was built for Intel's GPUs, and there is none
        found["also"] = XpuDevice
        for _ in range(3):
            assert get_device_manager(probe=absent).kind == "cuda"
    (record,) = caplog.records
    assert "auto is cuda, and torch.accelerator is xpu" in record.getMessage()


# --- packages, each in a process of its own


@pytest.mark.parametrize("name", ["torch_npu", "habana_frameworks.torch"])
def test_a_package_is_looked_for_without_being_imported(tmp_path, monkeypatch, name):
    assert not is_installed(name)
    package(tmp_path, name, "raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed(name)
    assert not is_installed(f"{name}.nothing")
    assert name.partition(".")[0] not in sys.modules


def trial(folder, code, seconds=60.0):
    package(folder, "vendor_package", code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return try_package("vendor_package", "fake", seconds)


@pytest.mark.parametrize(
    ("code", "rung", "why"),
    [
        (WORKS.replace("AVAILABLE", "True").replace("KIND", "fake"), None, ""),
        ("raise OSError('libhccl.so: cannot open shared object file')", "loads", "OSError: libhccl.so: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "loads", "ended with SIGSEGV"),
        ("import os, sys; sys.stderr.write('driver panic\\n'); os._exit(9)", "loads", "status 9: driver panic"),
        ("raise SystemExit(4)", "loads", "SystemExit: 4"),
        ("", "loads", "RuntimeError: Expected one of cpu, cuda"),
        (
            WORKS.replace("AVAILABLE", "1 / 0").replace("KIND", "fake") + "torch.get_device_module = lambda _: module",
            "available", "ZeroDivisionError",
        ),
    ],
)  # fmt: skip
def test_how_far_a_package_comes(tmp_path, code, rung, why):
    if rung is None:
        code += "torch.get_device_module = lambda _: module\n"
    found = trial(tmp_path, code)
    assert found.failed == rung
    assert why in found.why
    assert found.count == (3 if rung is None else 0)


def test_a_package_that_hangs_is_ended_with_what_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        f"held = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(held.pid))\ntime.sleep(60)"
    )
    begin = time.monotonic()
    found = trial(tmp_path, code, seconds=2.0)
    assert time.monotonic() - begin < 10
    assert found == Presence(installed=True, why="it did not answer in 2 s")
    child = int((tmp_path / "child").read_text())
    time.sleep(0.1)
    with contextlib.suppress(FileNotFoundError):
        assert "(zombie)" in Path(f"/proc/{child}/status").read_text()


def test_torch_npu_without_cann(tmp_path):
    """As the real wheel is on a machine without it: `import torch` itself fails, and the ladder says why."""
    package(tmp_path, "torch_npu", "raise OSError('libhccl.so: cannot open shared object file: No such file')")
    distribution(tmp_path, "torch-npu", "torch.backends", "torch_npu = torch_npu:_autoload")

    def run(code, **environment):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        )  # fmt: skip

    torchs = run("import torch")
    assert torchs.returncode != 0
    assert "Failed to load the backend extension: torch_npu" in torchs.stderr
    asks = (
        "from apt_model.core.system import get_device\nassert get_device().type == 'cpu'\n"
        "try:\n    get_device('npu')\nexcept Exception as error:\n    print(error)"
    )
    done = run(asks, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert "device 'npu': installed, but it does not load: OSError: libhccl.so: cannot open" in done.stdout
    assert "set_env.sh" in done.stdout
    assert "pip uninstall torch-npu" in done.stdout
    # Without torch, which does not load: what a program for diagnosis asks.
    asks = (
        "import sys\nfrom apt_model.core.system.trial import is_installed, try_package\n"
        "print(is_installed('torch_npu'), try_package('torch_npu', 'npu', 60).reason)\n"
        "assert 'torch' not in sys.modules"
    )
    done = run(asks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True installed, but it does not load: OSError: libhccl.so")


@pytest.mark.parametrize(
    ("vendor", "rung", "remedy"),
    [
        (NpuDevice, "installed", "pip install torch-npu=="),
        (NpuDevice, "available", "npu-smi info"),
        (HpuDevice, "installed", "docs.habana.ai"),
        (HpuDevice, "loads", "hl-smi"),
        (HpuDevice, "available", "HABANA_VISIBLE_MODULES"),
    ],
)
def test_each_rung_has_its_remedy(monkeypatch, vendor, rung, remedy):
    rungs = {"installed": {}, "loads": {}, "available": {"loads": True}}
    monkeypatch.setattr(accelerator_module, "is_installed", lambda _: rung != "installed")
    monkeypatch.setattr(
        accelerator_module, "try_package", lambda *_: Presence(installed=True, **rungs[rung], why="broken")
    )
    with pytest.raises(DeviceError) as caught:
        get_device(vendor.kind)
    assert remedy in caught.value.remedy


# --- other packages' devices


def test_a_third_partys_device_comes_before_the_cpu_and_after_ours(tmp_path, monkeypatch):
    found = third_party(tmp_path, monkeypatch)
    assert [vendor.kind for vendor in manager.vendors()] == ["cuda", "hpu", "npu", "xpu", "mtia", "cpu"]
    monkeypatch.setattr(found, "presence", classmethod(lambda _: TWO))
    monkeypatch.setattr(found, "load", classmethod(lambda _: None))
    assert get_device() == torch.device("mtia")
    assert get_device("mtia:1") == torch.device("mtia:1")
    monkeypatch.setenv("APT_DEVICE", "mtia:1")
    assert get_device() == torch.device("mtia:1")
    monkeypatch.setenv("APT_DEVICE", "cpu")
    assert get_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit", "SystemExit"),
        ("Other = 7", "expected a subclass of apt_model.core.system.Device, got 7"),
        ("class Other: pass", "expected a subclass"),
        ("class Other(Device): kind = 'NPU:0'", "expected a `kind` of lower-case letters, such as 'npu', got 'NPU:0'"),
        ("class Other(Device): pass", "got None"),
        ("class Other(Device): kind = 'npu'", "the device type 'npu' has NpuDevice already"),
        ("class Another: pass", "AttributeError"),
    ],
)
def test_a_broken_entry_is_said_once_and_left_out(tmp_path, monkeypatch, caplog, code, why):
    name = f"broken_devices_{abs(hash(code))}"
    package(tmp_path, name, f"from apt_model.core.system import Device\n{code}\n")
    distribution(tmp_path, "broken-devices", manager.ENTRY_POINTS, f"x = {name}:Other")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, logger="apt_model"):
        for _ in range(3):
            assert get_device() == get_device_manager().device
    (record,) = caplog.records
    assert f"entry point x = {name}:Other is left out: " in record.getMessage()
    assert why in record.getMessage()


# --- what is asked, of modules that have more and less


class Vendor(Accelerator):
    kind = "maia"


def module(monkeypatch, **functions):
    """`torch.maia` with these functions only."""
    found = types.ModuleType("torch.maia")
    vars(found).update(functions)
    monkeypatch.setattr(torch, "maia", found, raising=False)
    return Vendor(1)


def test_a_module_without_anything_has_stand_ins(monkeypatch):
    device = module(monkeypatch)
    assert not any(
        device.supports(fn)
        for fn in ("empty_cache", "synchronize", "memory_allocated", "total_memory", "free_memory", "name", "stream")
    )
    assert device.empty_cache() is device.synchronize() is device.reset_peak_memory() is None
    assert (device.memory_allocated(), device.peak_memory(), device.total_memory(), device.free_memory()) == (
        0,
        0,
        0,
        0,
    )
    assert device.name() == "maia"
    assert device.supports_bf16() is False
    assert device.stream() is device.event() is device.current_stream() is NOTHING
    with device.during(device.stream()):
        pass
    values = torch.ones(2)
    assert device.pin(values) is values
    assert not device.register_host(0, 1)
    assert not device.supports("register_host")
    assert device.current_index() == 1


def test_the_vendors_module_is_asked_first_with_the_index(monkeypatch):
    asked = []

    def answers(name, value=None):
        return lambda *args: asked.append((name, *args)) or value

    device = module(
        monkeypatch, synchronize=answers("synchronize"), empty_cache=answers("empty_cache"),
        memory_allocated=answers("memory_allocated", 5), mem_get_info=answers("mem_get_info", (50, 80)),
        memory_reserved=answers("memory_reserved", 20), get_device_name=answers("get_device_name", "Chip"),
        manual_seed_all=answers("manual_seed_all"),
    )  # fmt: skip
    device.synchronize()
    device.empty_cache()
    device.manual_seed(3)
    assert (device.name(), device.total_memory(), device.memory_allocated()) == ("Chip", 80, 5)
    assert device.free_memory() == 50 + 20 - 5
    assert ("synchronize", 1) in asked
    assert ("empty_cache",) in asked
    assert ("manual_seed_all", 3) in asked
    assert all(device.supports(fn) for fn in ("empty_cache", "synchronize", "free_memory", "total_memory", "name"))
    assert not device.supports("peak_memory")


def test_torch_accelerator_is_asked_second_where_it_speaks_of_the_device(monkeypatch):
    device = module(monkeypatch)
    seen = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("maia"))
    monkeypatch.setattr(torch.accelerator, "synchronize", seen.append)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: 9)
    monkeypatch.setattr(torch.accelerator, "memory_stats", dict)
    device.synchronize()
    assert seen == [1]
    assert device.memory_allocated() == 9
    assert device.supports("synchronize")


def test_an_allocator_that_torch_accelerator_cannot_ask_is_not_asked(monkeypatch):
    def asserts():
        raise RuntimeError("Allocator for maia is not a DeviceAllocator")

    device = module(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("maia"))
    monkeypatch.setattr(torch.accelerator, "memory_stats", asserts)
    assert device.memory_allocated() == 0
    assert not device.supports("empty_cache")
    device.empty_cache()
    assert device.supports("synchronize")


@pytest.mark.parametrize(("count", "failed"), [(0, "available"), (2, None)])
def test_intels_gpus_are_torchs_own(monkeypatch, count, failed):
    assert XpuDevice.presence().failed == "installed"
    assert "download.pytorch.org/whl/xpu" in XpuDevice.presence().remedy
    monkeypatch.setattr(torch.xpu, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: count)
    found = XpuDevice.presence()
    assert (found.failed, found.count) == (failed, count)
    if count:
        assert get_device() == torch.device("xpu")
        with pytest.raises(DeviceError, match="no such number"):
            get_device("xpu:2")
    else:
        assert "xpu-smi" in found.remedy
    assert "intel_extension_for_pytorch" not in sys.modules


def test_gaudi_is_never_started_to_look_for_it(monkeypatch):
    gaudi = types.ModuleType("torch.hpu")
    gaudi.is_available, gaudi.device_count = lambda: True, lambda: 8
    gaudi.init = lambda: pytest.fail("init reserves the device")
    monkeypatch.setattr(torch, "hpu", gaudi, raising=False)
    monkeypatch.setitem(sys.modules, "habana_frameworks", types.ModuleType("habana_frameworks"))
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch", types.ModuleType("habana_frameworks.torch"))
    assert HpuDevice.presence().count == 8
    assert get_device("hpu:7") == torch.device("hpu:7")
    device = get_device_manager("hpu")
    assert not device.supports("empty_cache")
    device.empty_cache()
    assert device.supports_bf16()


def test_triton_is_tried_once_and_says_why_not(monkeypatch):
    triton_works.cache_clear()
    verdict = triton_works(torch.device("cpu"))
    assert verdict is triton_works(torch.device("cpu"))
    assert verdict.works or verdict.why
    triton_works.cache_clear()
    monkeypatch.setitem(sys.modules, "apt_model.core.system.triton_kernel", None)
    assert triton_works(torch.device("cpu")).why.startswith("ModuleNotFoundError")
    triton_works.cache_clear()
