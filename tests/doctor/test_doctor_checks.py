"""The parts of the doctor one by one: each can find something, and each can find nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machines import GIB, LIMITS, MIB, OURS, Machine

import apt_model.core.system as core_system
from apt_model.cli.diagnosis import disk, gpu, installed, memory, probe, settings, verdicts
from apt_model.cli.diagnosis.children import Children, Outcome
from apt_model.cli.diagnosis.diagnose import diagnose
from apt_model.cli.diagnosis.finding import CODES, SEVERITIES
from apt_model.cli.diagnosis.packages import fits
from apt_model.cli.diagnosis.redact import redacted
from apt_model.core.errors import DeviceError


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "machine")


def codes(findings):
    return [finding.code for finding in findings]


# Versions and metadata.


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("2.13.0+cpu", "==2.13.0"), ("2.13", ">=2.11"), ("2.9.1", "<2.11"), ("1.26.4", ">=1.26,<2"),
        ("3.12.1", "<3.14,>=3.10"),
        ("2.13.0", "==2.13.*"), ("2.12.0", "!=2.13.*"), ("2.14.0.dev20261101+cu130", ">=2.11"), ("1.5.2", "~=1.4"),
        ("1.4.9", "~=1.4.2"), ("2.13.0.post1", ">2.13"), ("0.8.0rc1", "<0.8"), ("nightly", ">=2"), ("1.0", ""),
    ],
)  # fmt: skip
def test_a_version_that_fits(version, wanted):
    assert fits(version, wanted)


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("2.9.1", ">=2.11"), ("2.0.0", ">=1.26,<2"), ("2.12.1", "==2.13.*"), ("2.13.0", "!=2.13.*"), ("2.0", "~=1.4"),
        ("1.5.0", "~=1.4.2"), ("2.13.0", "==2.12.0"), ("0.8.0rc1", ">=0.8"), ("2.13.0", ">2.13"), ("3.14.0", "<3.14"),
    ],
)  # fmt: skip
def test_a_version_that_does_not(version, wanted):
    assert not fits(version, wanted)


def test_metadata_is_read_without_importing(machine):
    machine.info("Some_Thing", "1.0", "Requires-Dist: torch (>=2) ; extra == 'gpu'\nRequires-Dist: numpy[x]>=1,<3\n")
    package = machine.system().packages.get("some-thing")
    assert [(need.name, need.versions, need.extra) for need in package.requirements()] == [
        ("torch", ">=2", "gpu"), ("numpy", ">=1,<3", None),
    ]  # fmt: skip
    ours = machine.system().packages.get("apt-transformer")
    assert ours.field("Requires-Python") in OURS
    assert list(ours.entry_points("torch.backends")) == []


def test_a_32_bit_python_is_named(machine):
    machine.changes["bits"] = 32
    assert codes(installed.python(machine.system())) == ["APT-D01"]


def test_an_extra_that_is_not_installed_is_no_fault_and_the_developers_tools_are_not_ours_to_judge(machine):
    machine.info("apt-transformer", "0.1.0", OURS + "Requires-Dist: pytest>=8; extra == 'dev'\n")
    machine.info("pytest", "7.0")
    assert list(installed.ours(machine.system())) == []


def test_what_is_installed_for_another_system_is_not_asked_for(machine):
    machine.info("torchaudio", "2.0", "Requires-Dist: torch==1.0; platform_system == 'Haiku'\n")
    assert list(installed.tied(machine.system())) == []


def test_torch_says_what_triton_it_was_made_for(machine):
    machine.info("torch", "2.13.0", "Requires-Dist: triton==3.9.0; platform_system == 'Linux'\n")
    machine.info("triton", "3.1.0")
    (found,) = installed.tied(machine.system())
    assert found.severity == "warning"
    assert found.remedy.endswith("install 'triton==3.9.0'")


def test_a_torch_of_another_platform_is_asked_for_where_it_is(machine):
    torch = machine.system().packages.get("torch")
    assert installed.exactly(torch) == "'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu"


# GPU.


def test_a_driver_of_the_same_major_version_runs_newer_minor_ones(machine):
    machine.torch("2.13.0+cu129", cuda="12.9")
    assert list(gpu.age(machine.system(), "12.4")) == []
    assert codes(gpu.age(machine.system(), "11.8")) == ["APT-D09"]


def test_what_the_driver_says_counts_more_than_its_number(machine):
    """With a package for forward compatibility an older driver runs a newer CUDA."""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.file(
        "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release\n"
    )
    assert list(gpu.age(machine.system(), "13.0")) == []
    assert codes(gpu.age(machine.system(), None)) == ["APT-D09"]


def test_a_cpu_torch_beside_torch_npu_is_meant_so(machine):
    machine.file("dev/nvidia0")
    assert codes(gpu.build(machine.system())) == ["APT-D08"]
    machine.info("torch-npu", "2.13.0")
    assert list(gpu.build(machine.system())) == []


@pytest.mark.parametrize(
    ("value", "hides"), [("", True), ("-1", True), ("0", False), ("0,7", False), ("2", True), ("GPU-12ab", False)]
)
def test_a_variable_hides_gpus(machine, value, hides):
    machine.torch("2.13.0+cu130", cuda="13.0")
    for number in range(2):
        machine.file(f"dev/nvidia{number}")
    machine.environ["CUDA_VISIBLE_DEVICES"] = value
    assert codes(gpu.hidden(machine.system())) == ["APT-D24"] * hides


@pytest.mark.parametrize(
    ("mode", "owner", "open_"), [(0o666, 1000, True), (0o600, 1000, True), (0o660, 0, False), (0o640, 1000, True)]
)
def test_rights_follow_owner_group_and_mode(machine, mode, owner, open_):
    path = machine.file("dev/nvidia0", mode=mode)
    machine.changes |= {"uid": path.stat().st_uid if owner else 54321, "gids": frozenset([54321])}
    if path.stat().st_uid == 0 and owner:
        return  # root may do all
    assert codes(gpu.rights(machine.system())) == [] if open_ else ["APT-D23"]


def test_a_device_that_this_torch_has_no_use_for_may_be_closed(machine):
    path = machine.file("dev/kfd", mode=0o600)
    machine.changes |= {"uid": path.stat().st_uid + 1, "gids": frozenset()}
    assert [each.severity for each in gpu.rights(machine.system())] == ["note"]
    (machine.site / "torch" / "version.py").write_text("__version__ = '2.13.0'\nhip: str = '7.1'\n")
    assert [each.severity for each in gpu.rights(machine.system())] == ["broken"]


def test_a_cpu_torch_in_a_container_without_gpu_is_no_fault(machine):
    machine.file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n")
    machine.file(".dockerenv")
    assert [each.severity for each in gpu.driver(machine.system())] == ["note"]


def test_wsl_with_its_gpu_is_a_note(machine):
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.file("proc/version", "Linux version 6.6.87.2-microsoft-standard-WSL2")
    machine.file("dev/dxg")
    assert [(each.code, each.severity) for each in gpu.wsl(machine.system())] == [("APT-D27", "note")]
    assert memory.bound(machine.system()) > GIB


def test_a_machine_without_the_drivers_tool_is_a_note(machine):
    machine.file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n")
    machine.file("dev/nvidia0")
    assert codes(gpu.listed(machine.system())) == ["APT-D26"]


# What children tell.


def outcome(name, stage, **told):
    return Outcome(name, stages=[{"stage": stage, "seconds": 0.1, **told}])


def computed(kind="cuda", **stages):
    told = [{"stage": "import torch", "version": "2"}, {"stage": "device", "kind": kind, "name": "a card"}]
    return Outcome("torch", stages=[*told, *({"stage": name, **each} for name, each in stages.items())])


@pytest.mark.parametrize(
    ("told", "code", "words"),
    [
        (computed(kernel={"wrong": 3, "of": 1024}), "APT-D28", "3 of 1024 numbers"),
        (computed(kernel={"error": ["RuntimeError: no kernel image is available"]}), "APT-D28", "no kernel image"),
        (computed(kernel={"wrong": 0}, triton={"wrong": True, "error_of_result": 0.5}), "APT-D28", "off by 0.5"),
        (computed(kernel={"wrong": 0}, triton={"error": ["CompilationError: no ptxas"]}), "APT-D28", "no ptxas"),
        (computed(pinned={"bytes": GIB, "bound": 2 * GIB, "words": "out of memory"}), "APT-D31", "1.0 GiB of 2.0 GiB"),
        (computed(pinned={"error": ["RuntimeError: no"]}), "APT-D31", "no"),
        (computed(pinned={"bytes": GIB, "bound": GIB, "words": ""}, kernel={"wrong": 0}), None, ""),
        (outcome("torch", "device", error=["AttributeError: no"]), "APT-D12", "no"),
        (Outcome("torch", code=1, err="Fatal Python error: init"), "APT-D90", "Fatal Python error"),
        (Outcome("torch", end="absent", err="no such file"), "APT-D90", "no such file"),
        (Outcome("torch", end="late", begun="kernel", seconds=30), "APT-D14", "'kernel' does not end"),
        (Outcome("torch", end="signal", code=-9, begun="import torch"), "APT-D13", "memory ran out"),
    ],
)  # fmt: skip
def test_a_verdict_on_torch(machine, told, code, words):
    found = list(verdicts.of_torch(machine.system(), told))
    assert codes(found) == ([code] if code else [])
    assert all(words in f"{each.cause} {each.figure}" for each in found)


def test_a_gpu_that_torch_does_not_find_is_told_in_its_words(machine):
    machine.file("dev/nvidia0")
    cuda = {"built": True, "count": 0, "why": "CUDA unknown error"}
    (found,) = verdicts.finds_no_gpu(machine.system(), outcome("torch", "device", kind="cpu", cuda=cuda))
    assert (found.code, found.figure) == ("APT-D25", "CUDA unknown error")


def test_less_is_locked_than_the_limit_says(machine):
    machine.file("proc/self/limits", LIMITS.format(64 * MIB, 64 * MIB))
    refused = outcome("lock", "lock", bytes=16 * MIB, bound=256 * MIB, words="Cannot allocate memory")
    assert codes(verdicts.of_lock(machine.system(), refused)) == ["APT-D31"]
    kept = outcome("lock", "lock", bytes=64 * MIB, bound=256 * MIB, words="Cannot allocate memory")
    assert list(verdicts.of_lock(machine.system(), kept)) == []
    machine.file("proc/self/limits", LIMITS.format("unlimited", "unlimited"))
    assert codes(verdicts.of_lock(machine.system(), kept)) == ["APT-D31"]
    assert codes(verdicts.of_lock(machine.system(), Outcome("lock", code=1))) == ["APT-D90"]


def test_a_driver_without_its_library(machine):
    missing = ["OSError: libcuda.so.1: cannot open shared object file: No such file or directory"]
    (found,) = verdicts.of_driver(machine.system(), outcome("driver", "driver", error=missing))
    assert found.code == "APT-D10"
    assert "libcuda.so.1, of NVIDIA's driver" in found.cause


# Processes.


@pytest.fixture
def children():
    with Children() as started:
        yield started


def python(children, name, code, **limits):
    environ = {"PATH": os.environ["PATH"]}
    children.start(name, [sys.executable, "-S", "-c", code], environ, **{"limit": 20.0, "patience": 0.4, **limits})


def test_one_that_sleeps_is_stopped_and_one_that_works_is_waited_for(children):
    began = time.perf_counter()
    python(children, "sleeps", "import time; time.sleep(60)")
    python(children, "works", "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass")
    python(children, "never ends", "while True: pass", limit=0.5)
    children.start("absent", ["/nowhere/program"], {}, limit=1.0, patience=1.0)
    ended = children.wait()
    assert {name: each.end for name, each in ended.items()} == {
        "sleeps": "idle", "works": "exit", "never ends": "late", "absent": "absent",
    }  # fmt: skip
    assert ended["works"].seconds > 1
    assert time.perf_counter() - began < 20


def test_what_a_process_started_does_not_outlive_it(children):
    inner = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(p.pid, flush=True)"
    )
    python(children, "parent", inner)
    told = children.wait()["parent"]
    assert (told.end, told.seconds < 10) == ("exit", True)
    deadline = time.perf_counter() + 5
    while _runs(int(told.out)) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not _runs(int(told.out))


def test_leaving_the_block_ends_what_still_runs():
    with Children() as started:
        python(started, "sleeps", "import time; time.sleep(60)", patience=60.0)
        process = started._children[0].process
    assert process.returncode == -9


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_flood_of_words_does_not_block(children):
    python(children, "flood", "import sys\nfor _ in range(300): sys.stderr.write('x' * 65536)")
    told = children.wait()["flood"]
    assert told.end == "exit"
    assert 0 < len(told.err) <= MIB


def test_a_stage_that_hangs_in_a_package_is_placed(machine):
    machine.package("numpy", "import time\n\n\ndef wait():\n    time.sleep(60)\n\n\nwait()\n")
    found = [each for each in diagnose(machine.system()).findings if each.severity == "broken"]
    assert codes(found) == ["APT-D14"]
    assert "'import numpy' waits" in found[0].cause
    assert "numpy/__init__.py, line 5" in found[0].cause


def test_memory_is_taken_until_it_is_refused_and_given_back():
    held, most = {}, 40 * MIB

    def take(address, size):
        if sum(held.values()) + size > most:
            return "refused"
        held[address] = size
        return ""

    found = {}
    probe._until_refused(found, 200 * MIB, take, lambda address, _: held.pop(address))
    assert held == {}
    assert (found["bytes"], found["bound"], found["words"]) == (most, 200 * MIB, "refused")


class _Pinned:
    """A device that pins so many bytes."""

    def __init__(self, most):
        self.most, self.held = most, {}

    def register_host(self, address, nbytes):
        if sum(self.held.values()) + nbytes > self.most:
            raise DeviceError("cuda: pinning: out of memory")
        self.held[address] = nbytes

    def unregister_host(self, address):
        del self.held[address]


def test_memory_is_pinned_through_the_device_until_it_refuses(monkeypatch):
    device = _Pinned(48 * MIB)
    monkeypatch.setattr(core_system, "get_device_manager", lambda _: device)
    found = {}
    probe._pin(found, 128 * MIB)
    assert device.held == {}
    assert found == {"bytes": 48 * MIB, "bound": 128 * MIB, "words": "cuda: pinning: out of memory"}


# Disk.


def test_the_disk_is_tried_with_a_file_that_is_gone_before_it_is_written(tmp_path):
    told = []
    probe.probe_disk(told.append, {"folder": str(tmp_path)})
    assert "error" not in told[-1]
    assert told[-1]["write_gbps"] > 0
    assert told[-1]["read_gbps"] > 0
    assert told[-1]["bytes"] <= probe._FILE
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_it_is_tried(machine, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        probe.probe_disk(told.append, {"folder": str(machine.tmp)})
    (words,) = told[-1]["error"]
    assert disk.refused(machine.tmp, words, given=False).code == "APT-D41"
    assert disk.refused(machine.tmp, "PermissionError: no", given=False).code == "APT-D40"
    assert list(machine.tmp.iterdir()) == []


def test_a_folder_across_a_network(machine):
    machine.file("proc/self/mountinfo", "25 1 0:22 / / rw - nfs4 server:/home rw\n")
    (found,) = disk.checks(machine.system(), machine.tmp, given=True)
    assert (found.code, found.severity) == ("APT-D42", "warning")


def test_a_folder_that_is_not_there(machine):
    assert codes(disk.checks(machine.system(), machine.folder / "nowhere", given=True)) == ["APT-D40"]


# Settings.


@pytest.mark.parametrize(
    ("address", "is_safe"),
    [
        ("https://host/v1", True), ("http://localhost:8000", True), ("http://host/v1", False), ("host/v1", False),
        ("https://", False), ("https://[", False),
    ],
)  # fmt: skip
def test_an_address(machine, address, is_safe):
    machine.environ |= {"SALAD_API_KEY": "x", "SALAD_ENDPOINT": address}
    assert codes(settings.clouds(machine.system())) == ["APT-D51"] * (not is_safe)


def test_a_server_of_ones_own_may_have_no_key(machine):
    machine.environ |= {"APT_CLOUD_ENDPOINT": "http://localhost:8080"}
    assert list(settings.clouds(machine.system())) == []


def test_an_empty_variable_is_an_unset_one(machine):
    machine.environ |= {"RUNPOD_API_KEY": "", "RUNPOD_ENDPOINT_ID": ""}
    assert list(settings.clouds(machine.system())) == []


def test_a_variable_of_another_program_with_our_prefix_is_a_note(machine):
    machine.environ["APT_CONFIG"] = "/etc/apt.conf"
    assert [each.severity for each in settings.unknown(machine.system())] == ["note"]


def test_a_device_that_no_version_knows(machine):
    machine.environ["APT_DEVICE"] = "cude"
    (found,) = settings.device(machine.system())
    assert "did you mean 'cuda'" in found.cause


# Codes and privacy.


def test_codes_are_distinct_from_those_of_errors_and_in_order():
    assert list(CODES) == sorted(CODES)
    assert all(name.startswith("APT-D") and meaning and advice for name, (meaning, advice) in CODES.items())
    assert SEVERITIES[0] == "broken"


def test_every_code_that_is_found_is_explained():
    sources = Path(verdicts.__file__).parent.glob("*.py")
    text = "".join(path.read_text() for path in sources if path.name != "finding.py")
    used = set(re.findall(r'"(APT-D\d\d)"', text))
    assert used == set(CODES)


def test_names_and_folders_are_taken_out(machine):
    machine.changes |= {"home": Path("/home/canary"), "private": ("canary", "canary-host")}
    told = {
        "a": ["/home/canary/x.py: Canary on canary-host", f"{machine.site}/torch/lib/libx.so"],
        "b": {
            "c": "/data/projects/canary-secret/lib/liby.so.1 and /usr/lib/libz.so; https://download.pytorch.org/whl/cpu"
        },
        "d": 5,
    }
    made = redacted(told, machine.system(), machine.tmp)
    assert "canary" not in json.dumps(made).lower()
    assert made["a"] == ["~/x.py: *** on ***", "$SITE/torch/lib/libx.so"]
    assert made["b"]["c"] == "$ELSEWHERE/liby.so.1 and /usr/lib/libz.so; https://download.pytorch.org/whl/cpu"
    assert made["d"] == 5


def test_the_command_loads_no_torch():
    code = (
        "import sys; from apt_model.cli.main import main; main(['doctor', '--quick']); "
        "print(sorted({'torch', 'numpy', 'triton', 'tokenizers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
