"""Show a layer computed elsewhere, with numbers measured in this run; leaves with an error if a check does not hold.

python training/test_cloud_npu.py

Uses the clouds that the environment describes (docs/CLOUD_NPU_GUIDE.md). Where none answers, a server of this script's
own stands in, on this machine: then it shows the protocol and what happens when a server dies, and no speed of a cloud.
"""

import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import apt_model.optimization.vb_global as vb
from apt_model.cloud.backend import CloudBackend, OIPBackend
from apt_model.cloud.fake import FakeServer
from apt_model.cloud.fake_http import Served, serving
from apt_model.cloud.http_transport import HttpTransport
from apt_model.optimization import CloudNPULinear, enable_cloud_npu, get_cloud_npu_manager

FORWARDS = 30
failed: list[str] = []


def check(claim: str, measured: str, holds: bool) -> None:
    """Print one claim with what was measured, and remember it if it does not hold."""
    print(f"  {'holds' if holds else 'FAILS'}  {claim}: {measured}")
    if not holds:
        failed.append(claim)


@contextlib.contextmanager
def a_backend() -> Iterator[tuple[CloudBackend, Served | None]]:
    """The first cloud that answers and takes tensors, or a server in this process."""
    print("\n1. What the environment describes")
    report = enable_cloud_npu("auto")
    print("  " + str(report).replace("\n", "\n  "))
    manager = get_cloud_npu_manager()
    for name in report.available:
        backend = manager.get_backend(name)
        if backend is not None and "tensors" in backend.capabilities:
            yield backend, None
            manager.close()
            return
    print("  none that takes tensors answers: a server of this script stands in")
    with serving(FakeServer()) as served:
        backend = OIPBackend([HttpTransport(served.url)], name="stand-in")
        yield backend, served
        backend.close()
    manager.close()


def show_a_layer(backend: CloudBackend) -> CloudNPULinear:
    print(f"\n2. A layer on {backend!r}")
    layer = CloudNPULinear(in_features=768, out_features=3072, cloud_backend=backend, fallback_local=True)
    x = torch.randn(32, 768)
    with torch.no_grad():
        output = layer(x)
        local = F.linear(x, layer.weight, layer.bias)
        worst = float((output - local).abs().max())
        check("the product is the local one", f"{worst:.1e} apart at most", worst < 1e-4)
        started = time.perf_counter()
        for _ in range(FORWARDS):
            layer(x)
        elsewhere = 1e3 * (time.perf_counter() - started) / FORWARDS
        times = []
        for _ in range(FORWARDS):
            started = time.perf_counter()
            F.linear(x, layer.weight, layer.bias)
            times.append(1e3 * (time.perf_counter() - started))
    stats = layer.get_stats()
    print(f"  a forward takes {elsewhere:.2f} ms elsewhere, {statistics.median(times):.2f} ms here")
    activations = x.nbytes + local.nbytes
    each = (stats["bytes_sent"] + stats["bytes_received"]) / max(stats["cloud_calls"], 1)
    check("all forwards were elsewhere", f"{stats['cloud_calls']} of {FORWARDS + 1}", stats["cloud_ratio"] == 1.0)
    check("a forward carries activations alone", f"{each:,.0f} bytes of {activations:,}", each < activations + 2000)
    weights = stats["bytes_pushed"]
    check("the weights went up at most once", f"{weights:,} bytes", weights <= layer.weight.nbytes * 1.01 + 20_000)
    return layer


def show_gradients(layer: CloudNPULinear) -> None:
    print("\n3. Gradients")
    x = torch.randn(32, 768, requires_grad=True)
    layer(x).square().sum().backward()
    found, x.grad = x.grad, None
    F.linear(x, layer.weight, layer.bias).square().sum().backward()
    assert found is not None
    assert x.grad is not None
    apart = float((found - x.grad).norm() / x.grad.norm())
    check("the gradient to x is the local one", f"{apart:.1e} apart", apart < 1e-5)
    check("it came from elsewhere", f"{layer.get_stats()['backward_cloud']}", layer.get_stats()["backward_cloud"] == 1)


def show_eight_bits(backend: CloudBackend) -> None:
    print("\n4. Activations in 8 bits")
    layer = CloudNPULinear(768, 3072, cloud_backend=backend, wire="int8g64")
    x = torch.randn(32, 768)
    with torch.no_grad():
        output, local = layer(x), F.linear(x, layer.weight, layer.bias)
    error = float((output - local).norm() / local.norm())
    stats = layer.get_stats()
    each = stats["bytes_sent"] + stats["bytes_received"]
    check("close, at a quarter of fp32's bytes", f"error {error:.4f}, {each:,} bytes", error < 0.02 and each < 150_000)


def show_a_death(layer: CloudNPULinear, served: Served) -> None:
    print("\n5. The server is killed")
    served.close()
    x = torch.randn(32, 768)
    with torch.no_grad():
        started = time.perf_counter()
        output = layer(x)
        took = 1e3 * (time.perf_counter() - started)
        check("the answer is right", f"after {took:.2f} ms", torch.equal(output, F.linear(x, layer.weight, layer.bias)))
    stats = layer.get_stats()
    total = stats["cloud_calls"] + stats["local_calls"] + stats["raised"]
    check("every forward is counted once", f"{total} of {stats['forwards']}", total == stats["forwards"])
    print(f"  errors: {stats['errors']}, breaker: {stats['breaker'][0]}")


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="  %(message)s", stream=sys.stdout)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    vb.enable(verbose=False)
    with a_backend() as (backend, served):
        layer = show_a_layer(backend)
        show_gradients(layer)
        show_eight_bits(backend)
        if served is not None:
            show_a_death(layer, served)
    vb.disable()
    print(f"\nFailed: {'; '.join(failed)}" if failed else "\nAll checks hold.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
