"""The mission's APT configuration trained under `vb.enable_balanced_mode()`, beside plain PyTorch: time and memory.

    python benchmarks/modes/training.py [--small] [--rounds 3] [--steps 4] [--out FOLDER]

12 + 12 layers, d_model 768, all mechanisms on, batch 32, 512 + 512 positions, fused AdamW, not compiled. One process,
rounds interleaved. Plain is the model in fp32 as PyTorch runs it; `autocast` is what one writes by hand; the balanced arm is
the model built after `vb.enable_balanced_mode()` and nothing else. The same for torch's `nn.Transformer`, which is given to
`vb.optimize`. `recompute` is the balanced arm told that it has no memory. Memory is the peak of a step, weights and
optimizer included.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

import apt_model.optimization.vb_global as vb
from benchmarks import record
from benchmarks.training.throughput import DEVICE, SMALL, PlainTransformer, Shape, apt, seconds_a_step


def all_on(shape: Shape) -> nn.Module:
    return apt(shape, use_left_spin=True, use_autopoietic=True, use_dbc_dac=True)


def plain_apt(shape: Shape) -> nn.Module:
    return all_on(shape)


def balanced_apt(shape: Shape) -> nn.Module:
    vb.enable_balanced_mode(verbose=False)
    model = all_on(shape)
    vb.disable()
    return model


def recomputed_apt(shape: Shape) -> nn.Module:
    vb.enable_balanced_mode(verbose=False, activation_checkpointing="on")
    model = all_on(shape)
    vb.disable()
    return model


def balanced_transformer(shape: Shape) -> nn.Module:
    vb.enable_balanced_mode(verbose=False)
    return vb.optimize(PlainTransformer(shape).to(DEVICE).train())


def recomputed_transformer(shape: Shape) -> nn.Module:
    vb.enable_balanced_mode(verbose=False, activation_checkpointing="on")
    return vb.optimize(PlainTransformer(shape).to(DEVICE).train())


ARMS: dict[str, tuple[Callable[[Shape], nn.Module], bool]] = {
    "APT, plain PyTorch fp32": (plain_apt, False),
    "APT, autocast by hand": (plain_apt, True),
    "APT, balanced mode": (balanced_apt, False),
    "APT, balanced mode, recompute": (recomputed_apt, False),
    "nn.Transformer, plain PyTorch fp32": (PlainTransformer, False),
    "nn.Transformer, autocast by hand": (PlainTransformer, True),
    "nn.Transformer, vb.optimize": (balanced_transformer, False),
    "nn.Transformer, vb.optimize, recompute": (recomputed_transformer, False),
}


class Arm:
    """A model, built as its arm says."""

    def __init__(self, name: str, shape: Shape) -> None:
        build, self.cast = ARMS[name]
        torch.manual_seed(0)
        self.name, self.shape = name, shape
        self.model = build(shape).to(DEVICE).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        size = (shape.batch, shape.length)
        self.source, self.target, self.labels = (
            torch.randint(3, shape.vocab, size, generator=generator).to(DEVICE) for _ in range(3)
        )
        self.times: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def seconds(self, steps: int) -> float:
        return seconds_a_step(self.step, steps)

    def row(self) -> dict:
        middle = statistics.median(self.times)
        return {
            "arm": self.name, "ms_a_step": 1e3 * middle, "ms_all": [1e3 * each for each in self.times],
            "tokens_per_s": 2 * self.shape.batch * self.shape.length / middle, "peak_gib": self.peak / 2**30,
            "losses": self.losses,
        }  # fmt: skip

    def step(self) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16) if self.cast else contextlib.nullcontext():
            logits = self.model(self.source, self.target)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny shape, to check the script without a GPU")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    shape, arms = SMALL if options.small else Shape(), []
    for name in options.arms:
        arm = Arm(name, shape)
        arm.losses = [float(arm.step()) for _ in range(8)]
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            arm.step()
            own = sum(each.nbytes for each in arm.model.parameters()) * 3  # weights, and two moments
            arm.peak = torch.cuda.max_memory_allocated() - held + own
        arms.append(arm)
    for _ in range(options.rounds):
        for arm in arms:
            arm.times.append(arm.seconds(options.steps))
    rows = [arm.row() for arm in arms]
    for row in rows:
        print(
            f"| {row['arm']} | {row['ms_a_step']:.1f} ms ({min(row['ms_all']):.1f}-{max(row['ms_all']):.1f}) | "
            f"{row['tokens_per_s']:,.0f} tokens/s | {row['peak_gib']:.2f} GiB | "
            f"loss {row['losses'][0]:.3f} -> {row['losses'][-1]:.3f} |"
        )
    print(record.write("modes_training", rows, folder=options.out))


if __name__ == "__main__":
    main()
