import functools
import logging
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest
import torch

from apt_model.core.errors import DeviceError, InputError
from apt_model.core.system import Device, Presence, get_device, get_device_manager, manager
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.host_memory import HostMemory

ROOT = Path(__file__).parents[2]
MIB = 2**20

# What a machine may hold, as the CUDA probe sees it.
NOT_BUILT = Presence(installed=False, why="torch has no CUDA", remedy="install another torch")
NO_DRIVER = Presence(installed=True, loads=True, why="the driver is too old", remedy="see nvidia-smi")
NO_DEVICE = Presence(installed=True, loads=True, available=True)
ONE = Presence(installed=True, loads=True, available=True, count=1)
TWO = Presence(installed=True, loads=True, available=True, count=2)
BROKEN = OSError("libcuda.so.1: cannot open")
STATES = (NOT_BUILT, NO_DRIVER, NO_DEVICE, ONE, TWO, BROKEN)


def machine(cuda, cpu=ONE):
    def probe(vendor):
        found = {"cuda": cuda, "cpu": cpu}.get(vendor.kind, NOT_BUILT)
        if isinstance(found, Exception):
            raise found
        return found

    return probe


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("APT_DEVICE", raising=False)
    for cached in (manager._log_once, manager.ask, manager._load, manager.third_parties):
        cached.cache_clear()
    yield
    for cached in (manager._log_once, manager.ask, manager._load, manager.third_parties):
        cached.cache_clear()


# --- choosing


@pytest.mark.parametrize(
    "asked", [None, "", "auto", "cpu", "cuda", "cuda:1", "cuda:7", "npu", "tpu", "warp drive", "cuda:-1"]
)
@pytest.mark.parametrize("cpu", [ONE, BROKEN, NOT_BUILT])
@pytest.mark.parametrize("cuda", STATES)
def test_auto_never_raises_and_takes_what_is_asked_or_the_best(monkeypatch, caplog, cuda, cpu, asked):
    if asked is not None:
        monkeypatch.setenv("APT_DEVICE", asked)
    count = cuda.count if isinstance(cuda, Presence) else 0
    best = "cuda" if count else "cpu"
    there = {"cuda": count > 0, "cuda:1": count > 1, "cpu": cpu is ONE}
    with caplog.at_level(logging.WARNING, logger="apt_model"):
        devices = {get_device(probe=machine(cuda, cpu)) for _ in range(3)}
    assert devices == {torch.device(asked if there.get(asked) else best)}
    # A wish that cannot be met is said once; anything else is silent.
    assert len(caplog.records) == (asked not in (None, "", "auto") and not there.get(asked))


def test_the_automatic_choice_is_logged_once_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, logger="apt_model"):
        for _ in range(3):
            get_device(probe=machine(BROKEN))
    assert [record.getMessage() for record in caplog.records] == [
        "device: auto is cpu (no cuda, loads, but is not available: OSError: libcuda.so.1: cannot open)"
        + "".join(f" (no {kind}, not installed: torch has no CUDA)" for kind in ("hpu", "npu", "xpu"))
    ]


def test_a_missing_device_in_the_environment_is_named_with_what_failed(monkeypatch, caplog):
    monkeypatch.setenv("APT_DEVICE", "cuda:3")
    get_device(probe=machine(TWO))
    assert [record.getMessage() for record in caplog.records] == [
        "APT_DEVICE=cuda:3: device 'cuda:3': there is no such number here; taking the best there is"
    ]


@pytest.mark.parametrize(
    ("spec", "cuda", "message", "remedy"),
    [
        ("tpu", ONE, "expected auto, cuda, hpu, npu, xpu, cpu", None),
        ("CUDA", ONE, "expected auto, cuda, hpu, npu, xpu, cpu", None),
        ("cuda:", ONE, "expected auto, cuda, hpu, npu, xpu, cpu", None),
        ("cuda:x", ONE, "expected auto, cuda, hpu, npu, xpu, cpu", None),
        ("cuda:\N{ARABIC-INDIC DIGIT ONE}", TWO, "expected auto, cuda, hpu, npu, xpu, cpu", None),
        ("meta", ONE, "expected auto, cuda, hpu, npu, xpu, cpu", None),
        ("rocm", ONE, "expected auto, cuda, hpu, npu, xpu, cpu", "called cuda in torch"),
        ("cuda", NOT_BUILT, "not installed: torch has no CUDA", "install another torch"),
        ("cuda", NO_DRIVER, "loads, but is not available: the driver is too old", "see nvidia-smi"),
        ("cuda", BROKEN, "loads, but is not available: OSError: libcuda.so.1", None),
        ("cuda", NO_DEVICE, "available, but with no device", None),
        ("cuda:1", ONE, "there is no such number here", "this machine has cuda:0"),
        ("cuda:2", TWO, "there is no such number here", "this machine has cuda:0 to cuda:1"),
        ("cpu:1", ONE, "there is no such number here", "this machine has cpu:0"),
    ],
)
def test_an_explicit_device_that_is_not_there_raises_with_the_rung_that_failed(spec, cuda, message, remedy):
    for choose in (get_device, get_device_manager):
        with pytest.raises(DeviceError) as caught:
            choose(spec, probe=machine(cuda))
        assert caught.value.message.startswith(f"device {spec!r}: ")
        assert message in caught.value.message
        assert (remedy in caught.value.remedy) if remedy else caught.value.remedy is None


@pytest.mark.parametrize("spec", ["cpu", "cpu:0", "cuda", "cuda:0", "cuda:1"])
def test_an_explicit_device_that_is_there(spec):
    assert get_device(spec, probe=machine(TWO)) == torch.device(spec)
    assert get_device(torch.device(spec), probe=machine(TWO)) == torch.device(spec)
    found = get_device_manager(spec, probe=machine(TWO))
    assert found.device == torch.device(spec)
    assert found.get_accelerator_type() == spec.partition(":")[0]
    assert repr(found) == f"{type(found).__name__}({spec!r})"


def test_an_explicit_device_does_not_look_at_the_environment(monkeypatch):
    monkeypatch.setenv("APT_DEVICE", "cuda")
    assert get_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("spec", [None, 0, b"cpu"])
def test_what_is_no_device_at_all_is_an_input_error(spec):
    with pytest.raises(InputError, match="expected a name such as 'auto'"):
        get_device(spec)


def test_a_vendor_is_one_class_and_one_entry(monkeypatch):
    class AnyDevice(Device):
        kind = "mtia"
        presence = classmethod(lambda _: TWO)
        name = total_memory = free_memory = memory_allocated = peak_memory = lambda _: 7
        reset_peak_memory = empty_cache = synchronize = supports_bf16 = lambda _: None

    monkeypatch.setattr(manager, "ACCELERATORS", (CudaDevice, AnyDevice))
    absent = {"cuda": NOT_BUILT}
    probe = lambda vendor: absent.get(vendor.kind) or vendor.presence()  # noqa: E731
    assert get_device(probe=probe).type == "mtia"
    assert get_device("mtia:1", probe=probe) == torch.device("mtia", 1)
    found = get_device_manager(probe=probe)
    assert found.memory_allocated() == 7
    assert found.supports("synchronize")
    # What it leaves out it has not.
    assert not any(found.supports(fn) for fn in ("stream", "event", "current_stream", "during", "pin"))
    assert found.stream().query()
    with found.during(found.stream()):
        assert found.event(timed=True).query()
    with pytest.raises(DeviceError, match="no such number"):
        get_device("mtia:2", probe=probe)


def test_this_machine():
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert get_device().type == get_device_manager().get_accelerator_type() == best


def test_every_vendor_is_final_and_says_which_methods_stand_in():
    for vendor in manager.vendors():
        assert getattr(vendor, "__final__", sys.version_info < (3, 11))
    assert all(CudaDevice().supports(method) for method in Device.__abstractmethods__)
    with pytest.raises(InputError, match="got 'emtpy_cache'"):
        CpuDevice().supports("emtpy_cache")
    with pytest.raises(InputError):
        CpuDevice().supports("kind")
    assert not CpuDevice().supports("empty_cache")
    assert not CpuDevice().supports("synchronize")
    assert not CpuDevice().supports("stream")
    assert CudaDevice().supports("empty_cache")
    assert CudaDevice().supports("stream")


def test_importing_and_choosing_loads_and_starts_nothing():
    code = (
        "import sys, apt_model.core.system as s, apt_model.core.policy; assert 'torch' not in sys.modules\n"
        "d = s.get_device_manager(); import torch; assert not torch.cuda.is_initialized()\n"
        "assert not {'torch_npu', 'habana_frameworks', 'intel_extension_for_pytorch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


# --- CUDA, without a GPU


def built_for(monkeypatch, *, cuda=None, hip=None, count=0):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    # Below is_available, which has to be torch's own.
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", count if callable(count) else lambda: count)


def test_cuda_in_a_torch_without_it_does_not_count(monkeypatch):
    built_for(monkeypatch, count=8)
    why = f"torch {torch.__version__} is built with neither CUDA nor ROCm"
    assert CudaDevice.presence() == Presence(installed=False, why=why, remedy=CudaDevice.presence().remedy)
    assert get_device().type == "cpu"


def imitation():
    return True


imitation.__module__ = "torch_npu.contrib.transfer_to_npu"


@pytest.mark.parametrize(
    ("imitate", "who"),
    [
        (imitation, "torch_npu.contrib.transfer_to_npu"),
        (functools.wraps(torch.cuda.is_available)(lambda: True), __file__),
        (functools.partial(imitation), "functools"),
    ],
)
def test_an_imitation_of_cuda_does_not_count(monkeypatch, imitate, who):
    built_for(monkeypatch, cuda="13.0", count=8)
    monkeypatch.setattr(torch.cuda, "is_available", imitate)
    assert get_device().type == "cpu"
    with pytest.raises(DeviceError) as caught:
        get_device("cuda")
    assert f"installed, but it does not load: torch.cuda is imitated by {who}" in caught.value.message
    assert "take 'npu'" in caught.value.remedy


def test_cuda_is_asked_so_that_a_process_can_fork_after_it(monkeypatch):
    seen = []

    def count():
        seen.append(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"))
        return 1

    built_for(monkeypatch, cuda="13.0", count=count)
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", before)
        manager.ask.cache_clear()
        assert get_device() == torch.device("cuda")
        assert os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == before
    assert set(seen) == {"1"}


@pytest.mark.parametrize(
    ("versions", "platform_name", "tool"),
    [({"cuda": "13.0"}, "CUDA 13.0", "nvidia-smi"), ({"hip": "7.2"}, "ROCm 7.2", "rocm-smi")],
)
def test_what_cuda_and_rocm_say(monkeypatch, versions, platform_name, tool):
    built_for(monkeypatch, **versions)
    with pytest.raises(DeviceError) as caught:
        get_device("cuda")
    assert f"built for {platform_name} and finds no GPU" in caught.value.message
    assert tool in caught.value.remedy
    built_for(monkeypatch, **versions, count=4)
    manager.ask.cache_clear()
    assert get_device() == torch.device("cuda")
    assert get_device("cuda:3") == torch.device("cuda:3")
    assert get_device_manager().get_accelerator_type() == "cuda"
    assert CudaDevice.is_rocm() == ("hip" in versions)


def test_a_drivers_warning_becomes_the_reason(monkeypatch):
    def count():
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return 0

    built_for(monkeypatch, cuda="13.0", count=count)
    with pytest.raises(DeviceError, match="not available: The NVIDIA driver on your system is too old"):
        get_device("cuda")


@pytest.mark.parametrize("index", [None, 1])
def test_every_question_reaches_torch_with_the_index(monkeypatch, index):
    asked = []

    def answers(value):
        def answer(*args):
            asked.append(args)
            return value

        return answer

    total = type("Properties", (), {"total_memory": 80 * MIB})
    for name, value in {
        "get_device_name": "NVIDIA Test",
        "get_device_properties": total,
        "mem_get_info": (50 * MIB, 80 * MIB),
        "memory_reserved": 20 * MIB,
        "memory_allocated": 5 * MIB,
        "max_memory_allocated": 9 * MIB,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "is_initialized": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answers(value))
    device = CudaDevice(index)
    assert (device.name(), device.total_memory()) == ("NVIDIA Test", 80 * MIB)
    assert device.free_memory() == (50 + 20 - 5) * MIB
    assert (device.memory_allocated(), device.peak_memory()) == (5 * MIB, 9 * MIB)
    device.reset_peak_memory()
    device.synchronize()
    assert asked == [(index,)] * 7 + [(), (index,), (index,)]


def test_there_is_no_peak_to_reset_before_the_device_is_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: pytest.fail("started the device"))
    CudaDevice(0).reset_peak_memory()


@pytest.mark.parametrize(
    ("capability", "hip", "native"),
    [((7, 5), None, False), ((8, 0), None, True), ((12, 0), None, True), (None, "7", True)],
)
def test_bf16_on_gpus(monkeypatch, capability, hip, native):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert CudaDevice().supports_bf16() is native


# --- the CPU


def test_memory_of_this_process_is_read_and_not_guessed():
    device = CpuDevice()
    assert device.memory_allocated() == pytest.approx(psutil.Process().memory_info().rss, rel=0.02)
    assert device.memory_allocated() <= device.peak_memory() <= device.total_memory()
    assert 0 < device.free_memory() <= device.total_memory() <= psutil.virtual_memory().total
    before = device.memory_allocated()
    held = torch.ones(256 * MIB // 4)  # more than a heap keeps of what was freed before
    assert device.memory_allocated() - before == pytest.approx(held.nbytes, rel=0.1)
    del held
    assert device.peak_memory() >= before + 240 * MIB


@pytest.mark.skipif(not CpuDevice().supports("reset_peak_memory"), reason="this kernel does not reset a peak")
def test_the_peak_starts_again():
    device = CpuDevice()
    held = torch.ones(128 * MIB // 4)
    peak = device.peak_memory()
    del held
    device.reset_peak_memory()
    assert device.peak_memory() <= peak - 100 * MIB


def test_seeding_repeats_what_is_drawn():
    device = get_device_manager("cpu")
    device.manual_seed(3)
    first = torch.rand(4)
    device.manual_seed(3)
    torch.testing.assert_close(torch.rand(4), first, rtol=0, atol=0)


def test_no_ops_do_nothing_on_the_cpu():
    device = get_device_manager("cpu")
    assert device.empty_cache() is None
    assert device.synchronize() is None


@pytest.mark.parametrize(
    ("cpuinfo", "name", "native"),
    [
        ("processor : 0\nmodel name : Xeon 8480+\nflags : fpu avx512f avx512_bf16 amx_bf16\n", "Xeon 8480+", True),
        ("processor : 0\nmodel name : EPYC 9555\nflags : fpu avx512f avx512_bf16\n", "EPYC 9555", True),
        ("processor : 0\nmodel name : i7-8700\nflags : fpu avx2 notbf16\n", "i7-8700", False),
        ("processor : 0\nFeatures : fp asimd bf16 i8mm\n", None, True),
        ("processor : 0\nFeatures : fp asimd\n", None, False),
        (None, None, False),
    ],
)
def test_bf16_on_cpus(tmp_path, cpuinfo, name, native):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    device = CpuDevice(cpuinfo=path)
    assert device.supports_bf16() is native
    assert device.name() == (name or platform.processor() or platform.machine())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch is asked about x86 here")
def test_bf16_on_this_cpu_as_torch_sees_it():
    expected = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert CpuDevice().supports_bf16() is expected


# --- limits of a container

MEMINFO = f"MemTotal: {64 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {48 * 1024} kB\nHugePages_Total: 0\n\n"
MOUNT_V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
MOUNT_V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
NO_LIMIT_V1 = 2**63 - 4096


def host(root, cgroup="", mountinfo="", files=None, meminfo=MEMINFO):
    texts = {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **(files or {})}
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return HostMemory(root)


def group_v2(folder, limit, current=0, inactive=0):
    prefix = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {
        f"{prefix}/memory.max": limit,
        f"{prefix}/memory.current": current,
        f"{prefix}/memory.stat": f"anon 1\ninactive_file {inactive}",
    }


def group_v1(folder, limit, usage=0, inactive=0):
    prefix = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{prefix}/memory.limit_in_bytes": limit,
        f"{prefix}/memory.usage_in_bytes": usage,
        f"{prefix}/memory.stat": f"inactive_file 0\ntotal_inactive_file {inactive}",
    }


def test_without_control_groups_it_is_the_machines_memory(tmp_path):
    memory = host(tmp_path)
    assert (memory.total(), memory.free()) == (64 * MIB, 48 * MIB)


def test_a_container_of_version_2(tmp_path):
    memory = host(tmp_path, "0::/\n", MOUNT_V2.format(top="/"), group_v2("", 32 * MIB, 20 * MIB, 4 * MIB))
    assert (memory.total(), memory.free()) == (32 * MIB, 16 * MIB)


def test_the_tightest_of_nested_groups_holds(tmp_path):
    files = {
        **group_v2("", "max", 60 * MIB),
        **group_v2("pod", 24 * MIB, 23 * MIB),
        **group_v2("pod/task", 30 * MIB, 2 * MIB),
    }
    memory = host(tmp_path, "0::/pod/task\n", MOUNT_V2.format(top="/"), files)
    assert (memory.total(), memory.free()) == (24 * MIB, 1 * MIB)


def test_a_group_over_its_limit_leaves_nothing(tmp_path):
    memory = host(tmp_path, "0::/\n", MOUNT_V2.format(top="/"), group_v2("", 32 * MIB, 33 * MIB))
    assert memory.free() == 0


def test_a_hybrid_of_version_1_without_a_limit(tmp_path):
    cgroup = "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n"
    mountinfo = MOUNT_V1.format(top="/") + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    memory = host(tmp_path, cgroup, mountinfo, {**group_v1("", NO_LIMIT_V1), **group_v1("job", NO_LIMIT_V1)})
    assert (memory.total(), memory.free()) == (64 * MIB, 48 * MIB)
    memory = host(tmp_path, cgroup, mountinfo, group_v1("job", 16 * MIB, 9 * MIB, 1 * MIB))
    assert (memory.total(), memory.free()) == (16 * MIB, 8 * MIB)


@pytest.mark.parametrize(
    ("top", "group"), [("/docker/abc", "/docker/abc"), ("/docker/abc", "/elsewhere"), ("/", "/../x")]
)
def test_a_container_whose_group_is_named_from_outside(tmp_path, top, group):
    files = {**group_v1("", 8 * MIB, 5 * MIB), **group_v1("../x", 1 * MIB)}  # the second is outside what is mounted
    memory = host(tmp_path, f"4:memory:{group}\n", MOUNT_V1.format(top=top), files)
    assert (memory.total(), memory.free()) == (8 * MIB, 3 * MIB)


def test_what_the_process_holds_and_held(tmp_path):
    files = {"proc/self/statm": "900 7 3 1 0 5 0", "proc/self/status": "Name: python\nVmHWM:\t 9000 kB\nVmRSS:\t 28 kB"}
    memory = host(tmp_path, files=files)
    assert memory.resident() == 7 * os.sysconf("SC_PAGE_SIZE")
    assert memory.peak() == 9000 * 1024


def test_a_machine_without_proc_says_what_it_cannot_say(tmp_path):
    memory = HostMemory(tmp_path)
    assert memory.total() > 0
    assert memory.free() is None
    assert memory.resident() is None
    assert memory.peak() > MIB
    device = CpuDevice(memory=memory)
    assert not any(device.supports(fn) for fn in ("free_memory", "memory_allocated", "reset_peak_memory"))
    assert device.memory_allocated() == pytest.approx(memory.peak(), rel=0.01)
    assert 0 < device.free_memory() < device.total_memory()
    device.reset_peak_memory()
