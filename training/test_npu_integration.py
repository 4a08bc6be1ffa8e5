"""Show what this package does on the best device there is; leaves with an error if something it checks is not so.

python training/test_npu_integration.py

Takes what `get_device()` gives: a CUDA GPU, a Gaudi, an Ascend NPU, an Intel GPU, another package's device, else the
CPU; APT_DEVICE chooses another. Runs in less than a minute on two CPU cores.
"""

import copy
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.core.errors import DeviceError
from apt_model.core.system import Device, get_device, get_device_manager
from apt_model.core.system.manager import look, vendors
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration
from apt_model.optimization import FusedFP4Linear, VGPUStack

# Of the device's numbers beside the CPU's: sums in another order, over a training step; none on the CPU itself.
TOLERANCE = 1e-3
failed: list[str] = []


def check(claim: str, measured: str, holds: bool) -> None:
    """Print one claim with what was measured, and remember it if it does not hold."""
    print(f"  {'holds' if holds else 'FAILS'}  {claim}: {measured}")
    if not holds:
        failed.append(claim)


def apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference, beside the largest number."""
    got, expected = got.detach().cpu().float(), expected.detach().cpu().float()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def show_devices(manager: Device) -> None:
    print("\n1. Devices: each vendor's ladder is absent, installed, loads, available, count")
    for vendor in vendors():
        presence = look(vendor)
        found = f"{presence.count}" if presence.usable else presence.reason
        print(f"  {vendor.kind:5} {vendor.standing:16} {found}")
    check("the best one is taken", f"{manager.device}, {manager.name()}", get_device().type == manager.kind)
    try:
        get_device(f"{manager.kind}:99")
    except DeviceError as error:
        check("a device that is not there is refused", error.message, True)
    else:
        check("a device that is not there is refused", "it was given", False)


def show_manager(manager: Device) -> None:
    print("\n2. The device manager")
    questions = (
        "synchronize", "empty_cache", "memory_allocated", "peak_memory", "free_memory", "stream", "event", "pin",
        "register_host", "manual_seed",
    )  # fmt: skip
    print("  real here: " + ", ".join(each for each in questions if manager.supports(each)))
    print("  stands in: " + (", ".join(each for each in questions if not manager.supports(each)) or "nothing"))
    before = manager.memory_allocated()
    held = torch.ones(2**22, device=manager.device)
    manager.synchronize()
    grown = manager.memory_allocated() - before
    counts = not manager.supports("memory_allocated") or grown >= 0.9 * held.nbytes
    check("16 MiB more are counted", f"{grown / 2**20:.1f} MiB", counts)
    del held
    manager.empty_cache()
    manager.manual_seed(3)
    first = torch.rand(8, device=manager.device)
    manager.manual_seed(3)
    check("a seed repeats what is drawn", "8 numbers", torch.equal(torch.rand(8, device=manager.device), first))
    types = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if manager.supports_dtype(dtype)]
    native = "natively" if manager.supports_bf16() else "by way of fp32, if at all"
    check("fp32 matrices are multiplied", f"{', '.join(map(str, types))}; bf16 {native}", torch.float32 in types)


def build() -> APTModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "d_model": 64, "num_heads": 4, "d_ff": 128, "max_seq_len": 64, "num_decoder_layers": 4}
    return APTModel(APTModelConfiguration.from_dict({**shape, "decoder_only": True, "dropout": 0.0}))


def step(model: APTModel) -> tuple[Tensor, Tensor]:
    """The loss before and after one step of AdamW."""
    device = next(model.parameters()).device
    ids = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[1]


def show_training(manager: Device) -> APTModel:
    print("\n3. A training step of APTModel")
    there, here = build().to(manager.device), build()
    (first, second), (expected, _) = step(there), step(here)
    check("the loss is the CPU's", f"{apart(first, expected):.1e} apart", apart(first, expected) <= TOLERANCE)
    check("a step lowers it", f"{float(first):.4f} to {float(second):.4f} nats", float(second) < float(first))
    return there


def show_four_bits(manager: Device) -> None:
    print("\n4. FusedFP4Linear")
    torch.manual_seed(0)
    layer, x = FusedFP4Linear(128, 64), torch.randn(8, 128)
    there, y = copy.deepcopy(layer).to(manager.device), x.clone().to(manager.device).requires_grad_()
    x.requires_grad_()
    got, expected = there(y), layer(x)
    got.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    check("its output is the CPU's", f"{apart(got, expected):.1e} apart", apart(got, expected) <= TOLERANCE)
    check("its gradient is the CPU's", f"{apart(y.grad, x.grad):.1e} apart", apart(y.grad, x.grad) <= TOLERANCE)


def show_levels(manager: Device) -> None:
    print("\n5. VGPUStack: a model whose weights do not fit level 1")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)))
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    dense, x = copy.deepcopy(model).to(manager.device), torch.randn(4, 256, device=manager.device)
    first = manager.kind if manager.kind == "cpu" else f"{manager.kind}:{manager.current_index()}"
    levels = [{"capacity_mb": 0.5 * size, "device": first}, {"capacity_mb": 4 * size, "device": "cpu"}]
    with VGPUStack({"levels": levels}) as stack, torch.no_grad():
        stack.attach(model)
        same = all(torch.equal(model(x), dense(x)) for _ in range(3))
        used = stack.stats()["levels"][0]
        check("outputs are bit for bit the model's", "3 passes", same)
        check("level 1 keeps its capacity", f"{used['peak_mb']:.2f} of {size:.2f} MB", used["peak_mb"] <= 0.5 * size)
        stack.put("kept", x)
        check("a tensor comes back by its key", "4 x 256", torch.equal(stack.get("kept"), x))
        stack.detach(model)
    back = all(torch.equal(a, b.cpu()) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    check("detached, the weights are where and what they were", f"{size:.2f} MB on the CPU", back)


def show_files(manager: Device, model: APTModel) -> None:
    print("\n6. Saving and loading")
    prompt = torch.arange(8)[None].to(manager.device)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        back = APTModel.from_pretrained(folder).to(manager.device)
    pairs = zip(back.state_dict().values(), model.state_dict().values(), strict=True)
    check("weights come back bit for bit", f"{model.num_parameters():,}", all(torch.equal(a, b) for a, b in pairs))
    written = [each.generate(prompt, max_new_tokens=8).tolist() for each in (model, back)]
    check("the same is written", f"{written[0][0][8:]}", written[0] == written[1])


def main() -> int:
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    manager = get_device_manager()
    print(f"torch {torch.__version__}, device {manager.device}: {manager.name()}")
    show_devices(manager)
    show_manager(manager)
    model = show_training(manager)
    show_four_bits(manager)
    show_levels(manager)
    show_files(manager, model)
    print(
        f"\n{time.perf_counter() - started:.0f} s on {manager.device}. "
        + (f"Failed: {'; '.join(failed)}" if failed else "All checks hold.")
    )
    print(f"This shows what holds on {manager.kind}, and nothing of devices that are not here.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
