import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import apt_model
import apt_model.optimization.vb_global as vb
from apt_model.core.errors import ConfigError, InputError
from apt_model.core.policy import Policy, current_policy
from apt_model.core.system import Device, Presence, get_device_manager
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.host_memory import HostMemory
from apt_model.core.system.manager import vendors
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration
from apt_model.optimization import banner, calibration, facts

ROOT = Path(__file__).parents[2]
ROWS = [
    "accelerator",
    "GPU Flash",
    "VGPU stack",
    "multi-vendor backend",
    "cloud NPU",
    "left spin",
    "expected speed-up",
    "virtual memory",
]


@pytest.fixture(autouse=True)
def _disabled(monkeypatch):
    monkeypatch.delenv("APT_DEVICE", raising=False)
    monkeypatch.setattr(calibration._Process, "found", None)  # nobody has measured yet
    vb.disable()
    yield
    vb.disable()


class Follower:
    policy = None

    def apply_policy(self, policy):
        self.policy = policy


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Gpu(Device):
    """The answers of a GPU that this machine does not have."""

    kind = "cuda"

    def __init__(self, *, native_bf16):
        super().__init__(1)
        self.native_bf16 = native_bf16

    @classmethod
    def presence(cls):
        raise NotImplementedError

    def name(self):
        return "Test GPU [16]"

    def total_memory(self):
        return 80 * 2**30

    def free_memory(self):
        return 71 * 2**30

    def supports_bf16(self):
        return self.native_bf16

    memory_allocated = peak_memory = reset_peak_memory = empty_cache = synchronize = presence


def printed(**kwargs):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        vb.enable_balanced_mode(**kwargs)
    return stream.getvalue()


# --- the switch


def test_enabling_sets_the_balanced_policy_and_disabling_clears_it(capfd):
    assert not vb.is_enabled()
    for enable in (vb.enable, vb.enable_balanced_mode):
        enable(verbose=False)
        assert vb.is_enabled()
        assert current_policy() == Policy(mode="balanced", precision="auto", activation_checkpointing="auto")
        vb.disable()
        assert current_policy() is None
    assert capfd.readouterr() == ("", "")


def torch_settings():
    return {
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "sdpa": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()],
        "seed": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
    }


def test_it_leaves_no_trace_in_torch_or_the_environment():
    before = torch_settings()
    printed(verbose=True)
    assert torch_settings() == before
    vb.disable()
    assert torch_settings() == before


def test_an_existing_model_gets_the_policy_and_is_given_back():
    vb.enable(verbose=False)
    model = Follower()
    assert vb.optimize(model) is model
    assert model.policy is current_policy()


def test_apt_models_built_while_enabled_follow_and_others_do_when_passed():
    config = APTModelConfiguration(
        vocab_size=8, d_model=8, num_heads=2, d_ff=8, num_decoder_layers=1, decoder_only=True, max_seq_len=8
    )
    plain = APTModel(config)
    vb.enable(verbose=False)
    following = APTModel(config)
    assert plain.policy is None
    assert following.policy is current_policy()
    assert vb.optimize(plain) is plain
    vb.disable()
    assert APTModel(config).policy is None
    assert following.policy == Policy(mode="balanced")
    assert plain.policy is None  # as it was before it was passed


def test_optimize_needs_an_enabled_mode():
    with pytest.raises(ConfigError) as caught:
        vb.optimize(Follower())
    assert caught.value.remedy == "call vb.enable() first"


def test_optimize_refuses_what_is_no_model():
    vb.enable(verbose=False)
    with pytest.raises(InputError, match=r"expected an nn.Module.*got dict"):
        vb.optimize({})


# --- the facts


def test_status_is_what_the_machine_says():
    status, device = vb.status(), get_device_manager()
    assert json.loads(json.dumps(status)) == status
    assert (status["enabled"], status["mode"]) == (False, None)
    accelerator = status["accelerator"]
    assert accelerator["type"] == device.get_accelerator_type()
    assert accelerator["device"] == str(device.device)
    assert accelerator["name"] == device.name()
    assert accelerator["total_memory"] == device.total_memory()
    assert accelerator["free_memory"] == pytest.approx(device.free_memory(), rel=0.05)
    assert accelerator["torch"] == torch.__version__
    assert (accelerator["without_accelerator"] is None) == torch.cuda.is_available()
    assert status["native_bf16"] == device.supports_bf16()
    assert status["precision"] == ("bf16" if device.supports_bf16() else "fp32")
    assert status["multi_vendor_backend"] == {
        "cuda": "hardware-tested",
        "hpu": "backend-tested",
        "npu": "backend-tested",
        "xpu": "logic-tested",
        "cpu": "hardware-tested",
        "rocm": "logic-tested",
    }
    assert [vendor.kind for vendor in vendors()] == [*status["multi_vendor_backend"]][:-1]
    assert status["expected_speed_up"] is None
    vb.enable(verbose=False)
    assert (vb.status()["enabled"], vb.status()["mode"]) == (True, "balanced")


def test_what_is_absent_from_the_facts_is_absent_from_the_package():
    status = vb.status()
    assert status["cloud_npu"] == {"configured": []}
    assert {"CloudNPULinear", "enable_cloud_npu", "get_cloud_npu_manager"} <= set(apt_model.optimization.__all__)
    assert status["vgpu_stack"]
    assert status["virtual_memory"]
    assert "VGPUStack" in apt_model.optimization.__all__
    assert status["gpu_flash"]["fp4_weights"]
    assert {"FusedFP4Linear", "FP4Config", "quantize", "dequantize"} <= set(apt_model.optimization.__all__)


def test_the_attention_kernels_are_those_switched_on():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert facts.gather(CpuDevice())["gpu_flash"]["kernels"] == ["flash", "math"]
    with sdpa_kernel(SDPBackend.MATH):
        assert facts.gather(CpuDevice())["gpu_flash"]["kernels"] == ["math"]
        assert facts.gather(Gpu(native_bf16=True))["gpu_flash"]["kernels"] == ["math"]
    on_gpu = facts.gather(Gpu(native_bf16=True))["gpu_flash"]["kernels"]
    assert ("flash" in on_gpu) == torch.backends.cuda.is_flash_attention_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the GPU would run it")
def test_the_flash_kernel_of_the_cpu_is_the_one_that_runs():
    query = torch.randn(1, 2, 8, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.key for event in profile.key_averages()}


def test_left_spin_is_on_by_default_in_the_configuration():
    assert APTModelConfiguration().use_left_spin is True


# --- the banner


def test_the_rows_are_the_eight_in_their_order():
    assert [name for name, _ in banner.rows(vb.status())] == ROWS


@pytest.mark.parametrize("enabled", [False, True])
def test_every_number_in_it_was_read(enabled):
    if enabled:
        vb.enable(verbose=False)
    for device in (None, Gpu(native_bf16=True), Gpu(native_bf16=False)):
        status = facts.gather(device)
        found = status["accelerator"]
        text = "\n".join([banner.title(status), *(f"{name}: {row}" for name, row in banner.rows(status))])
        read = [
            apt_model.__version__,
            found["name"],
            found["device"],
            found["torch"],
            banner.gibibytes(found["total_memory"]),
            banner.gibibytes(found["free_memory"]),
        ]
        assert all(value in text for value in read)
        for value in sorted(read, key=len, reverse=True):
            text = text.replace(value, "")
        for word in ("bf16", "fp32", "FP4"):  # names of formats
            text = text.replace(word, "")
        assert re.findall(r"\S*\d\S*", text) == []


def test_sizes_are_in_gibibytes():
    assert banner.gibibytes(80 * 2**30) == "80.0 GiB"
    assert banner.gibibytes(25276510208) == "23.5 GiB"


def test_the_words_for_this_machine():
    rows = dict(banner.rows(facts.gather(CpuDevice())))
    assert rows["accelerator"].startswith(f"cpu: {CpuDevice().name()}, ")
    assert "no accelerator in use: " in rows["accelerator"]
    assert "FP4 weights: available" in rows["GPU Flash"]
    assert rows["VGPU stack"] == "available"
    assert rows["cloud NPU"] == "available; connected: none (enable_cloud_npu)"
    assert rows["multi-vendor backend"] == (
        "hardware-tested: cuda, cpu; backend-tested: hpu, npu; logic-tested: xpu, rocm"
    )
    assert rows["expected speed-up"] == banner.NOT_MEASURED
    assert rows["virtual memory"].startswith("available (VGPUStack); else what fits is bound by the CPU's ")


def test_the_words_for_a_gpu():
    status = facts.gather(Gpu(native_bf16=False))
    rows = dict(banner.rows(status))
    assert rows["accelerator"] == f"cuda:1: Test GPU [16], 80.0 GiB memory, 71.0 GiB free, torch {torch.__version__}"
    assert rows["virtual memory"].endswith(f"the GPU's 80.0 GiB; link and disk: {banner.NOT_MEASURED}")
    assert banner.title(status).endswith("fp32, no autocast (this GPU multiplies bf16 only by way of fp32)")
    assert "bf16 autocast (this GPU multiplies bf16 natively)" in banner.title(facts.gather(Gpu(native_bf16=True)))


def test_calibrating_fills_the_rows_with_what_was_measured(monkeypatch):
    monkeypatch.setattr(calibration._Process, "found", None)
    assert vb.status()["measured"] is None
    text = printed(verbose=True, calibrate=True)
    found, status = calibration.last(), vb.status()
    assert json.loads(json.dumps(status)) == status
    assert status["expected_speed_up"] == {
        "layer": list(found.layer),
        "format": "nvfp4",
        "by_rows": [[found.few_rows, found.few_speed_up], [found.many_rows, found.many_speed_up]],
    }
    assert status["measured"] == {"link_gbps": found.link_gbps, "disk_gbps": found.disk_gbps}
    assert f"{found.few_speed_up:.2g} times at 1 row, {found.many_speed_up:.2g} times at" in text
    assert f"disk {found.disk_gbps:.1f} GB/s" in text
    # Of another device nothing is said.
    assert facts.gather(Gpu(native_bf16=True))["measured"] is None


def test_what_could_not_be_measured_is_said_so():
    status = {**facts.gather(CpuDevice()), "measured": {"link_gbps": None, "disk_gbps": 1.25}}
    status["expected_speed_up"] = {"layer": [8, 4], "format": "nvfp4", "by_rows": [[1, None], [16, 1.5]]}
    rows = dict(banner.rows(status))
    assert rows["expected speed-up"] == (
        "a nvfp4 layer of 8 x 4 over a plain one, measured: not measured at 1 row, 1.5 times at 16 rows"
    )
    assert rows["virtual memory"].endswith("; link none, disk 1.2 GB/s")


def test_a_cpu_whose_free_memory_cannot_be_read(tmp_path):
    row = dict(banner.rows(facts.gather(CpuDevice(memory=HostMemory(tmp_path)))))["accelerator"]
    assert ", unknown free, " in row


def test_a_cpu_chosen_beside_an_accelerator_is_said_so(monkeypatch):
    one = Presence(installed=True, loads=True, available=True, count=1)
    absent = Presence(installed=False, why="no driver")
    monkeypatch.setattr(facts, "look", lambda vendor: one if vendor.kind == "cuda" else absent)
    row = dict(banner.rows(facts.gather(CpuDevice())))["accelerator"]
    assert row.endswith(
        "no accelerator in use: cuda is there and not asked for; "
        "hpu: not installed: no driver; npu: not installed: no driver; xpu: not installed: no driver"
    )


def test_away_from_a_terminal_it_is_plain_ascii():
    status = vb.status()
    status["accelerator"]["name"] = "Процессор"
    stream = io.StringIO()
    banner.show(status, stream)
    text = stream.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert [line[2:24].strip() for line in lines[1:]] == ROWS


def test_on_a_terminal_it_is_a_table_that_keeps_the_words(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    stream = Terminal()
    banner.show(facts.gather(Gpu(native_bf16=True)), stream)
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert "\N{BOX DRAWINGS LIGHT VERTICAL}" in text
    for name, row in banner.rows(facts.gather(Gpu(native_bf16=True))):
        assert name in text
        assert row in text  # "[16]" is no markup


def test_it_goes_to_stderr_and_says_the_mode(capfd):
    vb.enable(verbose=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"apt-transformer {apt_model.__version__}: balanced mode, ")
    assert "VGPU stack" in err
    assert banner.title({**vb.status(), "enabled": False, "mode": None}).startswith(
        f"apt-transformer {apt_model.__version__}: not enabled; balanced mode would be, "
    )


def test_a_real_terminal():
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    leader, follower = pty.openpty()
    code = "import apt_model.optimization.vb_global as vb; vb.enable()"
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, cwd=ROOT, env=environment, stderr=follower, stdout=subprocess.DEVNULL, check=True)
    os.close(follower)
    text = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal whose other side is closed with EIO
        while block := os.read(leader, 1 << 16):
            text += block
    os.close(leader)
    assert "\N{BOX DRAWINGS LIGHT VERTICAL}" in text.decode()
    assert all(name.encode() in text for name in ROWS)


# --- names


def test_the_facade_loads_neither_torch_nor_triton_nor_rich():
    code = (
        "import sys, apt_model, apt_model.optimization, apt_model.optimization.vb_global as vb\n"
        "vb.enable(verbose=False); assert vb.is_enabled(); vb.disable()\n"
        "heavy = {'torch', 'triton', 'rich', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def test_a_name_that_is_not_there_is_an_error_that_lists_what_is():
    with pytest.raises(AttributeError, match=r"it has CloudNPULinear, FP4Config, FusedFP4Embedding, .*, vb_global"):
        apt_model.optimization.Nonesuch  # noqa: B018
    with pytest.raises(ImportError):
        from apt_model.optimization import Nonesuch  # noqa: F401


def test_the_facades_names_are_the_layers_own():
    from apt_model.core.system.manager import get_device
    from apt_model.optimization import get_device as facade_device
    from apt_model.optimization import get_device_manager as facade_manager
    from apt_model.optimization import vb_global

    assert facade_device is get_device
    assert facade_manager is get_device_manager
    assert vb_global is vb
