"""A left-spin residual, forward and backward, uncompiled: the fused step beside its definition and a plain residual.

    python benchmarks/ops/left_spin.py [--small] [--out FOLDER]

The training shape of the mission (32 x 512 positions of 768), an fp32 stream and a bf16 step as under autocast. The
fused result is compared with the definition's in the same run. Bytes are what must move: operands read once, results
written once. GPU time, by
replays of a CUDA graph.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from apt_model.ops.left_spin import fused, naive
from benchmarks import record

DESIGN = {"alpha": 0.5, "tau": 0.3, "beta": 0.7, "w1": 1.0, "w2": 0.5}


def arms(u, delta, scale, before, phi):
    """Name -> (function, bytes that a token's row must move forward and backward)."""
    stream, step = 4 * u.shape[-1], 2 * u.shape[-1]
    forward, backward = 2 * stream + step, stream + step
    gates = {
        "design": fused.Gate(design=True, **DESIGN),
        "trust": fused.Gate(design=False, alpha=2.0),
        "guard": fused.Gate(design=False, alpha=2.0, tau=0.3),
    }
    return {
        "plain": (lambda: u + delta, forward + backward),
        "design, definition": (lambda: naive.design_step(u, delta, before, phi, **DESIGN)[0], forward + step + backward),
        "design, fused": (lambda: fused.step(u, delta, None, before, phi, gates["design"])[0], forward + step + backward),
        "trust, definition": (lambda: naive.trust_step(u, delta, scale, alpha=2.0), forward + step + backward),
        "trust, fused": (lambda: fused.step(u, delta, scale, None, None, gates["trust"])[0], forward + step + backward),
        "guard, definition": (lambda: naive.guard_step(u, delta, alpha=2.0, tau=0.3), forward + backward),
        "guard, fused": (lambda: fused.step(u, delta, None, None, None, gates["guard"])[0], forward + backward),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny shape, to check the script")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    rows, width = (8, 64) if options.small else (32 * 512, 768)
    u = torch.randn(rows, width, device="cuda", requires_grad=True)
    delta, before = (torch.randn(rows, width, device="cuda").bfloat16() for _ in range(2))
    delta.requires_grad_()
    scale = torch.randn(width, device="cuda", requires_grad=True)
    phi, upstream = torch.rand(rows, 1, device="cuda"), torch.randn(rows, width, device="cuda")
    table, results = [], {}
    for name, (function, row_bytes) in arms(u, delta, scale, before, phi).items():
        inputs = [u, delta, scale] if name.startswith("trust") else [u, delta]

        def both(function=function, inputs=inputs):
            return torch.autograd.grad(function(), inputs, upstream)

        results[name] = (function().detach(), both()[1])
        forward, step = (record.graph_seconds(run) for run in (function, both))
        moved = rows * row_bytes / step
        table.append(
            {"arm": name, "forward_us": 1e6 * forward, "forward_backward_us": 1e6 * step, "bytes_per_s": moved}
        )
        print(f"{name:20s} forward {1e6 * forward:7.1f} us, both {1e6 * step:7.1f} us, {moved / 1e12:.2f} TB/s")
    for form in ("design", "trust", "guard"):
        for got, expected in zip(results[f"{form}, fused"], results[f"{form}, definition"], strict=True):
            torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=1e-5)  # a bf16's last place
    print(record.write("left_spin", table, folder=options.out))


if __name__ == "__main__":
    main()
