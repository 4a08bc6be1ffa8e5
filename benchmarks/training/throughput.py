"""Training speed of the mission's configuration beside models of equal shape, and what each mechanism costs.

    python benchmarks/training/throughput.py [--small] [--eager] [--out FOLDER]

12 + 12 layers, d_model 768, 12 heads, d_ff 3072, vocabulary 30522, batch 32, 512 source and 512 target positions, bf16
autocast over fp32 weights, no dropout, fused AdamW, cross-entropy over all logits. One process holds every arm; rounds
are interleaved, so that a busy neighbour slows all arms alike. A tokens figure counts source plus target positions.
Every arm first has to lower its loss on one repeated batch, or its row says that it failed.
"""

import argparse
import concurrent.futures
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.modeling.apt_model import APTModel, APTModelConfiguration
from apt_model.trainer.config import GradientConfig
from apt_model.trainer.gradients import GradientTreatment
from benchmarks import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The problem."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    vocab: int = 30522
    batch: int = 32
    length: int = 512


SMALL = Shape(layers=2, width=64, heads=4, hidden=128, vocab=512, batch=2, length=32)


class PlainTransformer(nn.Module):
    """torch's own `nn.Transformer`, pre-norm, with embeddings, learned positions and an output matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.position = nn.Embedding(shape.length, shape.width)
        self.transformer = nn.Transformer(
            shape.width, shape.heads, shape.layers, shape.layers, shape.hidden,
            dropout=0.0, activation="gelu", batch_first=True, norm_first=True,
        )  # fmt: skip
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) + self.position.weight[: ids.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        u = self.transformer(self._embed(source), self._embed(target), tgt_mask=mask, tgt_is_causal=True)
        return self.lm_head(u)


class HuggingFace(nn.Module):
    """A Hugging Face sequence-to-sequence model as a function from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.model(input_ids=source, decoder_input_ids=target, use_cache=False).logits


def bart(shape: Shape) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=shape.vocab, d_model=shape.width, encoder_layers=shape.layers, decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads, decoder_attention_heads=shape.heads, encoder_ffn_dim=shape.hidden,
        decoder_ffn_dim=shape.hidden, max_position_embeddings=shape.length, dropout=0.0, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return HuggingFace(BartForConditionalGeneration(config))


def t5(shape: Shape) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=shape.vocab, d_model=shape.width, d_kv=shape.width // shape.heads, d_ff=shape.hidden,
        num_layers=shape.layers, num_decoder_layers=shape.layers, num_heads=shape.heads, dropout_rate=0.0,
        tie_word_embeddings=False, feed_forward_proj="gelu", use_cache=False,
    )  # fmt: skip
    return HuggingFace(T5ForConditionalGeneration(config))


def apt(shape: Shape, **mechanisms: object) -> nn.Module:
    off = {"use_left_spin": False, "use_autopoietic": False, "use_dbc_dac": False}
    return APTModel(
        APTModelConfiguration(
            vocab_size=shape.vocab, d_model=shape.width, num_encoder_layers=shape.layers,
            num_decoder_layers=shape.layers, num_heads=shape.heads, d_ff=shape.hidden, max_seq_len=shape.length,
            **{**off, **mechanisms},
        )
    )  # fmt: skip


ARMS: dict[str, Callable[[Shape], nn.Module]] = {
    "nn.Transformer": PlainTransformer,
    "BART (transformers)": bart,
    "T5 (transformers)": t5,
    "APT plain": apt,
    "APT + left spin": lambda shape: apt(shape, use_left_spin=True),
    "APT + autopoietic": lambda shape: apt(shape, use_autopoietic=True),
    "APT + DBC-DAC": lambda shape: apt(shape, use_dbc_dac=True),
    "APT, all on": lambda shape: apt(shape, use_left_spin=True, use_autopoietic=True, use_dbc_dac=True),
}


def seconds_a_step(step: Callable[[], object], steps: int) -> float:
    """GPU time, or the clock's without a GPU."""
    if DEVICE == "cuda":
        return record.gpu_seconds(step, repeat=steps, warm_up=1)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


class Arm:
    """One model with its optimizer, ready to take steps."""

    def __init__(self, name: str, shape: Shape, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.name, self.shape, self.compiled = name, shape, compiled
        self.model = ARMS[name](shape).to(DEVICE).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        size = (shape.batch, shape.length)
        self.source, self.target, self.labels = (torch.randint(3, shape.vocab, size, device=DEVICE) for _ in range(3))
        self.treatment = None
        if isinstance(self.model, APTModel) and self.model.config.use_dbc_dac:
            hidden = self.model.hidden_matrices()
            self.treatment = GradientTreatment(self.model, GradientConfig(), seed=0, hidden=hidden)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            logits = self.model(source, target)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def step(self) -> Tensor:
        loss = self.loss(self.source, self.target, self.labels)
        loss.backward()
        if self.treatment is not None:
            self.optimizer.found_inf = self.treatment(0).found_inf
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def seconds(self, steps: int) -> float:
        return seconds_a_step(self.step, steps)

    def row(self, timings: list[float], losses: tuple[float, float], peak: int) -> dict[str, object]:
        tokens = 2 * self.shape.batch * self.shape.length
        return {
            "arm": self.name, "compiled": self.compiled, "parameters": sum(p.numel() for p in self.model.parameters()),
            "ms_a_step": 1e3 * statistics.median(timings), "ms_lowest": 1e3 * min(timings),
            "ms_highest": 1e3 * max(timings), "tokens_per_s": tokens / statistics.median(timings),
            "peak_gib": peak / 2**30, "learns": losses[1] < losses[0], "loss_first": losses[0], "loss_last": losses[1],
        }  # fmt: skip


def measure(names: list[str], shape: Shape, *, compiled: bool, rounds: int, steps: int) -> list[dict[str, object]]:
    arms, notes = [], []
    for name in names:
        begin = time.perf_counter()
        arm = Arm(name, shape, compiled=compiled)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        first = float(arm.step())
        for _ in range(20):
            last = float(arm.step())
        state = sum(p.numel() for p in arm.model.parameters()) * 4 * 4
        peak = torch.cuda.max_memory_allocated() - before + state if DEVICE == "cuda" else 0
        arms.append(arm)
        notes.append(((first, last), peak))
        print(
            f"ready: {name} compiled={compiled} {time.perf_counter() - begin:.0f} s, loss {first:.3f} -> {last:.3f}",
            flush=True,
        )
    timings: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for arm in arms:
            timings[arm.name].append(arm.seconds(steps))
    return [arm.row(timings[arm.name], *note) for arm, note in zip(arms, notes, strict=True)]


def warm_caches(names: list[str], arguments: list[str]) -> None:
    """Compile every arm once in processes of their own, side by side, so that the measuring process finds it cached."""

    def one(name: str) -> None:
        subprocess.run([sys.executable, __file__, *arguments, "--warm", name], check=False)  # noqa: S603

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(one, names))


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| arm | compiled | ms a step (lowest-highest) | tokens/s | against nn.Transformer | against APT plain | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = {other["arm"]: other["ms_a_step"] for other in rows if other["compiled"] == row["compiled"]}
        ratios = [
            f"{base[name] / row['ms_a_step']:.3f}" if name in base else "-" for name in ("nn.Transformer", "APT plain")
        ]
        lines.append(
            f"| {row['arm']}{'' if row['learns'] else ' DOES NOT LEARN'} | {'yes' if row['compiled'] else 'no'} "
            f"| {row['ms_a_step']:.1f} ({row['ms_lowest']:.1f}-{row['ms_highest']:.1f}) | {row['tokens_per_s']:,.0f} "
            f"| {ratios[0]} | {ratios[1]} | {row['peak_gib']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny shape, to check the script")
    parser.add_argument("--eager", action="store_true", help="measure without torch.compile too")
    parser.add_argument("--eager-only", action="store_true", help="measure without torch.compile only")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help="which arms")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SMALL if options.small else Shape()
    torch.backends.cuda.matmul.allow_tf32 = True
    if options.warm:
        Arm(options.warm, shape, compiled=True).step()
        return
    rows: list[dict[str, object]] = []
    if options.eager or options.eager_only:
        rows += measure(options.arms, shape, compiled=False, rounds=options.rounds, steps=options.steps)
        print(table(rows), flush=True)
    if not options.eager_only:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            warm_caches(options.arms, ["--small"] if options.small else [])
        rows += measure(options.arms, shape, compiled=True, rounds=options.rounds, steps=options.steps)
        print(table(rows))
    print(record.write("training_throughput", rows, folder=options.out))


if __name__ == "__main__":
    main()
