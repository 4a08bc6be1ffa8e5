"""LoRA over frozen weights, one training step: FP4 beside bitsandbytes nf4 (QLoRA) and beside bf16.

    python benchmarks/fp4/lora.py [--sizes 1x2048 8x2048] [--arms NAME ...] [--rounds 7] [--steps 4] [--small] [--out FOLDER]

16 blocks of Llama-3-8B's shape (width 4096, 14336, 32 heads over 8), a small vocabulary, activation checkpointing, rank 16
on all seven matrices of a block through peft, bf16 adapters, fused AdamW. The same random weights and batch for every arm.
Every arm first has to lower its loss on one repeated batch, or its row says that it does not learn and reports no speed.
Peak memory is what an arm needs above what was there before it.

A round is some steps in a row of every arm, and each round begins with another arm; Python's collector waits meanwhile. A
step's time is its round's by the clock, host included; its spread is that of the rounds. Where the host binds, the time
that the GPU is at work says more: the union of its operations in one step's profile, which is taken last.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.fp4 import peers
from benchmarks.fp4.cells import DEVICE, attempt, synchronize

SIZES, SMALL_SIZES = ("1x2048", "8x2048"), ("1x16", "2x16")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
LEARNING_STEPS = 10
# As long as an arm takes steps in a round, at most.
ROUND_S = 1.0
# Relative error of all adapters' gradients after 16 layers in bf16.
LIMIT = 0.1


def llama(*, small: bool) -> nn.Module:
    """A frozen bf16 model; every call gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16, "num_attention_heads": 32}
    if small:
        shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = 2 if small else 8
    config = LlamaConfig(
        **shape, num_key_value_heads=heads, vocab_size=2048, use_cache=False, attn_implementation="sdpa", tie_word_embeddings=False
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def bitsandbytes(model: nn.Module) -> nn.Module:
    """QLoRA's weights: nf4, blocks of 64, scales quantised once more."""
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and not name.endswith(HEAD):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            model.set_submodule(name, layer.to(DEVICE))
    model.is_loaded_in_4bit = True  # peft looks for this
    return model


def ours(model: nn.Module) -> nn.Module:
    from apt_model.optimization import FP4Config, quantize

    return quantize(model, FP4Config(format="nvfp4", skip=(HEAD,)))


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LoRA on bf16": lambda model: model,
    "LoRA on bitsandbytes nf4": bitsandbytes,
    "LoRA on ours nvfp4": ours,
}
BASE = "LoRA on bf16"


def with_lora(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(MATRICES), task_type="CAUSAL_LM"
    )
    others = {type(module) for module in model.modules() if hasattr(module, "weight_packed")}
    if others and not all(issubclass(each, nn.Linear) for each in others):
        config._register_custom_module(dict.fromkeys(others, peft.tuners.lora.layer.Linear))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(DEVICE, torch.bfloat16)
    return model.train()


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch(size: str) -> Tensor:
    """Few different words, so that there is something to learn at once."""
    torch.manual_seed(2)
    return torch.randint(64, tuple(map(int, size.split("x"))), device=DEVICE)


def gradient_error(model: nn.Module, plain: nn.Module, ids: Tensor) -> float:
    """Relative error of the adapters' gradients against a bf16 model with the same values: backward through every layer."""
    twin = with_lora(plain)
    mine, exact = adapters(model), adapters(twin)
    for name, parameter in exact.items():
        parameter.data.copy_(mine[name].data)
    for each in (model, twin):
        each(input_ids=ids, labels=ids).loss.backward()
    pairs = [(mine[name].grad.float(), exact[name].grad.float()) for name in exact if "lora_B" in name]
    error = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    model.zero_grad()
    return error**0.5


def gpu_busy(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds in which the GPU does something, and the number of its operations."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        synchronize()
    spans = [each.time_range for each in found.events() if each.device_type == DeviceType.CUDA]
    busy, end = 0.0, 0.0
    for span in sorted(spans, key=lambda each: each.start):
        busy += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return busy / 1e6, len(spans)


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


@dataclasses.dataclass
class Arm:
    """One model with its optimizer, ready to take steps."""

    name: str
    why: str | None = None
    weight_bytes: int = 0
    gradient_error: float = 0.0
    losses: tuple[float, float] = (0.0, 0.0)
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    busy: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)

    def build(self, sizes: list[str], *, small: bool) -> None:
        before = allocated()
        frozen = ARMS[self.name](llama(small=small))
        self.weight_bytes = allocated() - before
        plain = None
        if self.name != BASE:
            plain = llama(small=small)
            for name, module in plain.named_modules():
                if isinstance(module, nn.Linear):
                    module.weight.data.copy_(peers.values_of(frozen.get_submodule(name)))
        self.model = with_lora(frozen)
        if plain is not None:
            self.gradient_error = gradient_error(self.model, plain, batch(sizes[0])[:, :256])
            del plain
        self.optimizer = torch.optim.AdamW(adapters(self.model).values(), lr=1e-3, fused=True)
        losses = [float(self.step(batch(sizes[0]))) for _ in range(LEARNING_STEPS)]
        self.losses = (losses[0], losses[-1])
        for size in sizes:
            self.step(batch(size))
            if DEVICE == "cuda":
                gc.collect()
                torch.cuda.reset_peak_memory_stats()
                self.step(batch(size))
                self.peak_bytes[size] = torch.cuda.max_memory_allocated() - before
        if not self.losses[1] < self.losses[0]:
            self.why = f"DOES NOT LEARN: loss {self.losses[0]:.3f} -> {self.losses[1]:.3f}"
        if not self.gradient_error <= LIMIT:
            self.why = f"WRONG NUMBERS: gradients differ by {self.gradient_error:.2g}"

    def step(self, ids: Tensor) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def measure(self, size: str, steps: int) -> None:
        ids = batch(size)
        gc.collect()
        steps = max(1, min(steps, int(ROUND_S / self.timed(ids, 1))))
        self.seconds.setdefault(size, []).append(self.timed(ids, steps))

    def timed(self, ids: Tensor, steps: int) -> float:
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(ids)
        synchronize()
        return (time.perf_counter() - begin) / steps

    def row(self, size: str, base: "Arm | None") -> dict[str, object]:
        row = {
            "size": size,
            "arm": self.name,
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes.get(size),
        }
        row |= {"gradient_error": self.gradient_error, "loss_first": self.losses[0], "loss_last": self.losses[1]}
        if self.why is not None:
            return row | {"why": self.why}
        each = self.seconds[size]
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        row |= {"step_s": middle, "step_s_quarter": low, "step_s_three_quarters": high, "rounds": each}
        row["tokens_per_s"] = batch(size).numel() / middle
        if size in self.busy:
            row["gpu_busy_s"], row["gpu_operations"] = self.busy[size]
        if base is not None:
            row["speed"] = statistics.median(base.seconds[size]) / middle
            if size in base.busy and size in self.busy:
                row["speed_gpu"] = base.busy[size][0] / self.busy[size][0]
        return row


def build(name: str, sizes: list[str], *, small: bool) -> Arm:
    arm = Arm(name)
    begin = time.perf_counter()
    try:
        arm.build(sizes, small=small)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is what its row says
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        arm.why = peers.why_of(error)
    print(
        f"ready: {name}, {time.perf_counter() - begin:.0f} s, loss {arm.losses[0]:.3f} -> {arm.losses[1]:.3f}, "
        f"gradient error {arm.gradient_error:.2g}, {arm.why or 'learns'}",
        flush=True,
    )
    return arm


def table(rows: list[dict]) -> str:
    lines = [
        "| size | arm | s a step (quarters; lowest-highest) | over bf16 | GPU at work, s (operations) | over bf16 | tokens/s | weights GiB | peak GiB |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        start = f"| {row['size']} | {row['arm']} | "
        if "why" in row:
            lines.append(f"{start}{row['why']} | | | | | | |")
            continue
        busy = f"{row['gpu_busy_s']:.4f} ({row['gpu_operations']})" if "gpu_busy_s" in row else "-"
        lines.append(
            f"{start}{row['step_s']:.4f} ({row['step_s_quarter']:.4f}, {row['step_s_three_quarters']:.4f}; "
            f"{min(row['rounds']):.4f}-{max(row['rounds']):.4f}) | {row.get('speed', float('nan')):.3f}x | {busy} "
            f"| {row.get('speed_gpu', float('nan')):.3f}x | {row['tokens_per_s']:,.0f} | {row['weight_bytes'] / 2**30:.2f} "
            f"| {(row['peak_bytes'] or 0) / 2**30:.2f} |"
        )
    return "\n".join(lines)


def measure_all(ready: list[Arm], sizes: list[str], rounds: int, steps: int) -> None:
    """In turns, each round from another arm on; then the profiles, which may hold launches back from then on."""
    gc.disable()
    for size in sizes:
        for number in range(rounds):
            for i in range(len(ready)):
                ready[(number + i) % len(ready)].measure(size, steps)
    if DEVICE == "cuda":
        for size in sizes:
            for arm in ready:
                made, _ = attempt(gpu_busy, partial(arm.step, batch(size)))
                arm.busy |= {} if made is None else {size: made}
    gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to check the script")
    parser.add_argument("--sizes", nargs="*", help=f"batch x length; default {' '.join(SIZES)}")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="in a round, or fewer where they are long")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    sizes = options.sizes or list(SMALL_SIZES if options.small else SIZES)
    if DEVICE == "cuda":  # the libraries' workspaces are there before anything is counted
        (
            torch.ones(64, 64, device=DEVICE, dtype=torch.bfloat16)
            @ torch.ones(64, 64, device=DEVICE, dtype=torch.bfloat16)
        ).sum()
    arms = [build(name, sizes, small=options.small) for name in options.arms]
    ready = [arm for arm in arms if arm.why is None]
    measure_all(ready, sizes, options.rounds, options.steps)
    base = next((arm for arm in ready if arm.name == BASE), None)
    rows = [arm.row(size, base) for size in sizes for arm in arms]
    print(table(rows))
    print(record.write("fp4_lora", rows, folder=options.out))


if __name__ == "__main__":
    main()
