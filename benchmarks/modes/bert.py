"""BERT-base of transformers under `vb.enable_speed_mode()`, beside eager fp16 and torch.compile, while shapes change.

    python benchmarks/modes/bert.py [--sizes 1x128 ...] [--rounds 40] [--small] [--out FOLDER]

12 layers, width 768, 12 heads, 3072, vocabulary 30522, random weights, `attn_implementation="sdpa"`, token ids without a
mask. Every arm is called with the sizes in turns, as a server with mixed requests would; a call is timed by the clock,
host and device, and waited for. The first rounds, in which arms compile and record, are not counted and are shown as
`first s` (with inductor's cache on disk filled before). What is compiled during the timed part is counted. Outputs are compared with the fp32 model at every size.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

import apt_model.optimization.vb_global as vb
from apt_model.layers.packed import PackedModule
from benchmarks import record
from benchmarks.fp4.bert import compiled_counts
from benchmarks.fp4.cells import DEVICE, synchronize

SIZES, SMALL_SIZES = ("1x128", "8x128", "64x128", "64x512"), ("1x8", "2x16")
# Relative error of the last hidden states; 16 bits through 12 layers, and 4 bits where a layer is in them.
LIMIT, LIMIT_FP4 = 0.03, 0.3
WARM = 6


def bert(*, small: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(attn_implementation="sdpa")
    if small:
        config = BertConfig(
            vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
    torch.manual_seed(0)
    return BertModel(config).to(DEVICE).eval()


def eager(model: nn.Module) -> nn.Module:
    return model.half()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model.half())


def reduce_overhead(model: nn.Module) -> nn.Module:
    return torch.compile(model.half(), mode="reduce-overhead")


def static(model: nn.Module) -> nn.Module:
    """A program for each shape: not what a user gets, but the fastest of torch.compile."""
    return torch.compile(model.half(), mode="reduce-overhead", dynamic=False)


def ours(model: nn.Module) -> nn.Module:
    vb.enable_speed_mode(verbose=False)
    found = vb.optimize(model)
    vb.explain(found)
    return found


def ours_fp4(model: nn.Module) -> nn.Module:
    vb.enable_speed_mode(verbose=False, fp4="on")
    return vb.optimize(model)


ARMS = {
    "fp16 eager": eager,
    "fp16 torch.compile": compiled,
    "fp16 reduce-overhead": reduce_overhead,
    "fp16 reduce-overhead, dynamic=False": static,
    "speed mode": ours,
    "speed mode, fp4=on": ours_fp4,
}
PEERS = ("fp16 eager", "fp16 torch.compile", "fp16 reduce-overhead")


class Arm:
    """A model, built as its arm says."""

    def __init__(self, name: str, base: nn.Module) -> None:
        self.name, self.model = name, ARMS[name](copy.deepcopy(base))
        self.times: dict[str, list[float]] = {}
        self.why: dict[str, str] = {}
        self.compiled_later = 0

    def __call__(self, ids: Tensor) -> Tensor:
        if "reduce" in self.name:
            torch.compiler.cudagraph_mark_step_begin()
        return self.model(ids).last_hidden_state

    def check(self, inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for size, ids in inputs.items():
            error = float((self(ids).float() - expected[size]).norm() / expected[size].norm())
            packed = any(isinstance(each, PackedModule) for each in self.model.modules())
            if not error <= (LIMIT_FP4 if packed else LIMIT):
                self.why[size] = f"WRONG NUMBERS: {error:.2g}"

    def timed(self, size: str, ids: Tensor) -> None:
        synchronize()
        begin = time.perf_counter()
        self(ids)
        synchronize()
        self.times.setdefault(size, []).append(time.perf_counter() - begin)


def fill_caches(arms: list[str]) -> None:
    """Compile each arm once in a process of its own, side by side, so that inductor's cache on disk has it."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--cold", "--rounds", "2", "--out", folder]
        commands = [[sys.executable, __file__, *options, "--arms", name] for name in arms if "eager" not in name]
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]  # noqa: S603
        for process in processes:
            process.wait()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", help=f"batch x length; default {' '.join(SIZES)}")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--small", action="store_true", help="a tiny model, to check the script without a GPU")
    parser.add_argument("--cold", action="store_true", help="do not compile in processes side by side first")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    if DEVICE == "cuda" and not options.cold:
        fill_caches(options.arms)
    base = bert(small=options.small)
    sizes = options.sizes or (SMALL_SIZES if options.small else SIZES)
    inputs = {
        size: torch.randint(base.config.vocab_size, tuple(map(int, size.split("x"))), device=DEVICE) for size in sizes
    }
    expected = {size: base(ids).last_hidden_state for size, ids in inputs.items()}
    arms, first = [], {}
    for name in options.arms:
        begin = time.perf_counter()
        torch._dynamo.reset()
        arm = Arm(name, base)
        for _ in range(WARM):
            for ids in inputs.values():
                arm(ids)
        arm.check(inputs, expected)
        first[name] = time.perf_counter() - begin
        before = compiled_counts()["graphs"]
        # Arms are timed one after the other, as dynamo's state is the process's; each with the sizes in turns.
        for _ in range(options.rounds):
            for size, ids in inputs.items():
                arm.timed(size, ids)
        arm.compiled_later = compiled_counts()["graphs"] - before
        arm.check(inputs, expected)
        arms.append((arm.name, arm.times, arm.why, arm.compiled_later, vb.stats()["models"]))
        print(f"{name}: {first[name]:.0f} s until ready, {arm.compiled_later} compiled later", flush=True)
        vb.disable()
        del arm
    rows = []
    for size in sizes:
        for name, times, why, later, stats in arms:
            row = {"size": size, "arm": name, "first_s": first[name], "compiled_later": later, "stats": stats}
            if size in why:
                rows.append(row | {"why": why[size]})
                continue
            low, *_, high = statistics.quantiles(times[size], n=10)
            rows.append(
                row | {"ms": 1e3 * statistics.median(times[size]), "ms_tenth": 1e3 * low, "ms_nine_tenths": 1e3 * high}
            )
    print(table(rows, sizes))
    print(record.write("modes_bert", rows, folder=options.out))


def table(rows: list[dict], sizes: list[str]) -> str:
    found = {(row["arm"], row["size"]): row for row in rows}
    names = list(dict.fromkeys(row["arm"] for row in rows))
    lines = [f"| ms a call | {' | '.join(sizes)} | first s |", "|---" * (len(sizes) + 2) + "|"]
    for name in names:
        cells = []
        for size in sizes:
            row = found[name, size]
            best = min((found[peer, size].get("ms", 1e9) for peer in PEERS if (peer, size) in found), default=None)
            over = f" ({best / row['ms']:.2f})" if best and "ms" in row else ""
            cells.append(f"{row['ms']:.3f}{over}" if "ms" in row else row["why"])
        lines.append(f"| {name} | {' | '.join(cells)} | {found[name, sizes[0]]['first_s']:.0f} |")
    return "\n".join([*lines, "In brackets: the best of eager, torch.compile and reduce-overhead over the arm."])


if __name__ == "__main__":
    main()
