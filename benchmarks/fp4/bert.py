"""BERT-base, whole forward, random weights: FP4 beside fp16, fp32 and bitsandbytes in time and in memory.

    python benchmarks/fp4/bert.py [--sizes 1x128 ...] [--arms NAME ...] [--no-compile] [--rounds 5] [--seconds 300] [--small]

12 layers, width 768, 12 heads, 3072, vocabulary 30522, transformers' own model. Every arm attends through
`scaled_dot_product_attention` without a mask, as there is no padding: transformers itself makes one while it is compiled
or captured, which would hold those arms back. What torch takes for it is read off a profile and printed; "plain
attention" writes the matrix of scores instead. Latency is the wall time of one call, device and host, each waited for;
throughput that of calls in a row. Every arm is first compared with an fp32 model that has the arm's own dequantised
weights. Peak memory counts what the arm's weights and one eager forward need above what was there before.

torch.compile makes a program for each size (dynamic=False), from an empty memory at each, first in processes side by side
into inductor's cache on disk. What is compiled during the timed part is counted and printed: it should be nothing. After
`--seconds` no further arm is compiled.
"""

import argparse
import copy
import dataclasses
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.fp4 import peers
from benchmarks.fp4.cells import DEVICE, attempt, in_processes, synchronize

SIZES, SMALL_SIZES = ("1x128", "8x128", "64x128", "64x512"), ("1x8", "2x16")
# Relative error of the last hidden states: fp16 through 12 layers.
LIMIT = 0.02
ROUND_S = 0.08
# What `ours` is to reach on an H200: speed over fp16 eager at these sizes, at the others above 1; memory at 1x128.
GOAL_SPEED, GOAL_FP16, GOAL_FP32 = {"1x128": 1.7, "8x128": 1.7}, 0.45, 0.2


def bert(*, small: bool) -> nn.Module:
    from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.bert.modeling_bert import eager_attention_forward

    AttentionInterface.register("sdpa_no_mask", sdpa_attention_forward)
    AttentionInterface.register("plain_no_mask", eager_attention_forward)
    for name in ("sdpa_no_mask", "plain_no_mask"):
        AttentionMaskInterface.register(name, lambda *_, **__: None)
    config = BertConfig()
    if small:
        config = BertConfig(
            vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
    config._attn_implementation = "sdpa_no_mask"
    torch.manual_seed(0)
    return BertModel(config).to(DEVICE).eval().requires_grad_(False)


def ours(model: nn.Module) -> nn.Module:
    from apt_model.optimization import FP4Config, quantize

    return quantize(model.half(), FP4Config())


def ours_tables_too(model: nn.Module) -> nn.Module:
    from apt_model.optimization import FP4Config, quantize

    return quantize(model.half(), FP4Config(embeddings=True))


def ours_plain_attention(model: nn.Module) -> nn.Module:
    model.config._attn_implementation = "plain_no_mask"
    return ours(model)


def bitsandbytes(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    model = model.half()
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear:
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, compute_dtype=torch.float16, quant_type="fp4", compress_statistics=False, device="meta"
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="fp4", compress_statistics=False, module=layer
            )
            layer.bias = linear.bias
            model.set_submodule(name, layer.to(DEVICE))
    return model


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fp32": lambda model: model,
    "fp16": lambda model: model.half(),
    "bitsandbytes fp4": bitsandbytes,
    "ours": ours,
    "ours, tables too": ours_tables_too,
    "ours, plain attention": ours_plain_attention,
}
BASE = "fp16 eager"
MODES = {"eager": "eager", "CUDA graph": "graph", "torch.compile": "compile", "reduce-overhead": "reduce"}
COMPILED = {"compile": "default", "reduce": "reduce-overhead"}
RUN_AS = {
    "fp32": ("eager", "CUDA graph"),
    "fp16": tuple(MODES),
    "bitsandbytes fp4": tuple(MODES),
    "ours": tuple(MODES),
    "ours, tables too": ("eager", "CUDA graph"),
    "ours, plain attention": ("CUDA graph",),
}
ARMS = {f"{name} {mode}": (name, MODES[mode]) for name, modes in RUN_AS.items() for mode in modes}


def exact_twin(model: nn.Module, base: nn.Module) -> nn.Module:
    """An fp32 model with the values of `model`."""
    twin = copy.deepcopy(base)
    for name, module in twin.named_modules():
        same = model.get_submodule(name)
        for part, parameter in module.named_parameters(recurse=False):
            values = (
                peers.values_of(same) if isinstance(module, nn.Linear) and part == "weight" else getattr(same, part)
            )
            parameter.data.copy_(values.reshape(parameter.shape))
    return twin


class Runner:
    """A model at one size, run in one of three ways."""

    def __init__(self, model: nn.Module, mode: str, ids: Tensor) -> None:
        self.model, self.mode, self.ids = model, mode, ids
        if mode == "graph":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model(self.ids)
            torch.cuda.synchronize()
            self.graph, self.static = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(self.graph, stream=stream):
                self.out = model(self.static).last_hidden_state
        if mode in COMPILED:
            self.model = torch.compile(model, mode=COMPILED[mode], dynamic=False)
        for _ in range(3):
            self()

    def __call__(self) -> Tensor:
        if self.mode == "graph":
            self.static.copy_(self.ids)
            self.graph.replay()
            return self.out
        if self.mode == "reduce":
            torch.compiler.cudagraph_mark_step_begin()
        return self.model(self.ids).last_hidden_state

    def latencies(self, calls: int) -> list[float]:
        found = []
        synchronize()
        for _ in range(calls):
            begin = time.perf_counter()
            self()
            synchronize()
            found.append(time.perf_counter() - begin)
        return found

    def in_a_row(self, calls: int) -> float:
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            self()
        synchronize()
        return (time.perf_counter() - begin) / calls


def compiled_counts() -> dict[str, int]:
    """What torch.compile has counted so far."""
    from torch._dynamo.utils import counters

    inductor = counters["inductor"]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "from_disk": inductor["fxgraph_cache_hit"],
        "without_cuda_graph": inductor["cudagraph_skips"],
    }


def counted(call: Callable[..., object], *arguments: object) -> tuple[object, dict[str, int]]:
    """What the call gives, and what it made torch.compile count."""
    before = compiled_counts()
    found = call(*arguments)
    return found, {name: count - before[name] for name, count in compiled_counts().items()}


@dataclasses.dataclass
class Built:
    """One model, and what it holds."""

    model: nn.Module | None
    why: str | None
    weight_bytes: int = 0
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)


def attention_of(model: nn.Module, ids: Tensor) -> str:
    """The kernel that attends, as a profile names it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        model(ids)
        synchronize()
    names = {
        event.key
        for event in found.key_averages()
        if re.search("flash|fmha|sdpa|attention|softmax", event.key, re.IGNORECASE)
    }
    return ", ".join(sorted(name[:80] for name in names)) or "none found"


def add_attention(rows: list[dict], builds: dict[str, Built], ids: dict[str, Tensor]) -> None:
    """Last of all: what profiles may hold launches back from then on."""
    known = {}
    for row in rows:
        (name, mode), size = ARMS[row["arm"]], row["size"]
        if "ms" in row and mode not in COMPILED:
            if (name, size) not in known:
                known[name, size] = attempt(attention_of, builds[name].model, ids[size])[0]
            row["attention"] = known[name, size]


def build(name: str, base: nn.Module, ids: dict[str, Tensor]) -> Built:
    """Make a model and measure its memory, in eager mode and before the next one is made."""
    gc.collect()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    built = Built(None, None)
    try:
        model = MODELS[name](copy.deepcopy(base))
        for size, each in ids.items():
            model(each)
            if DEVICE == "cuda":
                gc.collect()
                built.weight_bytes = built.weight_bytes or torch.cuda.memory_allocated() - before
                torch.cuda.reset_peak_memory_stats()
                model(each)
                built.peak_bytes[size] = torch.cuda.max_memory_allocated() - before
        built.model = model
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is what its row says
        built.why = peers.why_of(error)
    return built


@dataclasses.dataclass
class Ready:
    """One arm at one size: what runs it, or why nothing does."""

    runner: Runner | None = None
    error: float | None = None
    why: str | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    single: list[float] = dataclasses.field(default_factory=list)
    series: list[float] = dataclasses.field(default_factory=list)

    def measure(self) -> None:
        calls = max(3, min(50, int(ROUND_S / self.runner.in_a_row(2))))
        self.single += self.runner.latencies(calls)
        self.series.append(self.runner.in_a_row(calls))


def prepare(arm: str, model: nn.Module, ids: Tensor, expected: Tensor) -> Ready:
    runner, counts = counted(Runner, model, ARMS[arm][1], ids)
    error = float((runner().float() - expected).norm() / expected.norm())
    if not error <= LIMIT:
        return Ready(None, error, f"WRONG NUMBERS: {error:.2g}", counts)
    return Ready(runner, error, None, counts)


def exact(model: nn.Module, base: nn.Module, ids: Tensor) -> Tensor:
    return exact_twin(model, base)(ids).last_hidden_state


def measure_size(
    size: str, arms: list[str], builds: dict[str, Built], base: nn.Module, ids: Tensor, failed: dict[tuple[str, str], str],
    *, rounds: int, until: float,
) -> list[dict]:  # fmt: skip
    torch._dynamo.reset()
    expected, why, ready = {}, {}, {}
    for name, built in builds.items():
        expected[name], why[name] = attempt(exact, built.model, base, ids) if built.model else (None, built.why)
    # Graphs of torch.compile first: a graph recorded before them has failed twice when it was replayed
    # (docs/decisions/0010), perhaps as making them gives back the workspaces of cuBLAS.
    for arm in sorted(arms, key=lambda arm: ARMS[arm][1] not in COMPILED):
        name, mode = ARMS[arm]
        reason = why[name]
        if reason is None and mode in COMPILED:
            late = time.perf_counter() > until
            reason = "not compiled: the time was up" if late else failed.get((name, size))
        made = None
        if reason is None:
            made, reason = attempt(prepare, arm, builds[name].model, ids, expected[name])
        ready[arm] = made or Ready(why=reason)
    ready = {arm: ready[arm] for arm in arms}
    for _ in range(rounds):
        for arm, each in ready.items():
            if each.why is None:
                try:
                    made, each.why = attempt(counted, each.measure)
                except RuntimeError:
                    print(f"{size}: an error that stays with the device ends the run; first seen in {arm}", flush=True)
                    raise
                again = 0 if made is None else made[1]["graphs"]
                each.counts["in_timed_part"] = each.counts.get("in_timed_part", 0) + again
    base_s = statistics.median(ready[BASE].single) if BASE in ready and ready[BASE].single else None
    return [row_of(size, arm, each, builds[ARMS[arm][0]], ids, base_s) for arm, each in ready.items()]


def row_of(size: str, arm: str, ready: Ready, built: Built, ids: Tensor, base_s: float | None) -> dict:
    row = {"size": size, "arm": arm, "error": ready.error, "weight_bytes": built.weight_bytes}
    row["peak_bytes"] = built.peak_bytes.get(size) if ARMS[arm][1] == "eager" else None
    if ARMS[arm][1] in COMPILED:
        row["torch_compile"] = ready.counts
    if ready.why is not None:
        return row | {"why": ready.why}
    middle = statistics.median(ready.single)
    low, *_, high = statistics.quantiles(ready.single, n=10)
    row |= {"ms": 1e3 * middle, "ms_tenth": 1e3 * low, "ms_nine_tenths": 1e3 * high}
    row |= {"ms_in_a_row": 1e3 * statistics.median(ready.series)}
    row["tokens_per_s"] = ids.numel() / statistics.median(ready.series)
    if base_s is not None:
        row["speed"] = base_s / middle
    return row


def table(rows: list[dict], sizes: list[str]) -> str:
    """One page: time with the speed over fp16 eager, tokens per second, memory."""
    cells = {(row["arm"], row["size"]): row for row in rows}
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = [
        f"| ms a forward (over {BASE}) | {' | '.join(sizes)} | tokens/s, {sizes[-1]} | weights MB | peak MB, {sizes[0]} |",
        "|---" * (len(sizes) + 4) + "|",
    ]
    for arm in arms:
        shown = []
        for size in sizes:
            row = cells[arm, size]
            wrong = "WRONG" if "WRONG" in row.get("why", "") else "failed"
            shown.append(f"{row['ms']:.2f} ({row.get('speed', float('nan')):.2f}x)" if "ms" in row else wrong)
        first, last = cells[arm, sizes[0]], cells[arm, sizes[-1]]
        rate = f"{last['tokens_per_s']:,.0f}" if "tokens_per_s" in last else "-"
        peak = f"{first['peak_bytes'] / 1e6:.1f}" if first["peak_bytes"] else "-"
        lines.append(f"| {arm} | {' | '.join(shown)} | {rate} | {first['weight_bytes'] / 1e6:.1f} | {peak} |")
    return "\n".join([*lines, *notes(rows), *goals(cells, sizes)])


def notes(rows: list[dict]) -> list[str]:
    """Why arms have no figures, what attends, and what was compiled."""
    why, attention, lines = {}, {}, []
    for row in rows:
        if row.get("why"):
            why.setdefault((row["arm"], row["why"]), []).append(row["size"])
        if row.get("attention"):
            attention.setdefault((ARMS[row["arm"]][0], row["attention"]), {})[row["size"]] = None
    lines += [f"{arm}, {', '.join(sizes)}: {each[:300]}" for (arm, each), sizes in why.items()]
    lines += [f"attention of {name}, {', '.join(sizes)}: {each}" for (name, each), sizes in attention.items()]
    for arm in dict.fromkeys(row["arm"] for row in rows if row.get("torch_compile")):
        counts = [row["torch_compile"] for row in rows if row["arm"] == arm and row["torch_compile"]]
        shown = [f"{name} {'/'.join(str(each.get(name, '-')) for each in counts)}" for name in counts[0]]
        lines.append(f"{arm}, a number a size: {', '.join(shown)}")
    return lines


def goals(cells: dict, sizes: list[str]) -> list[str]:
    lines = []
    for arm in (arm for arm in ARMS if arm.startswith("ours")):
        speeds = {size: cells[arm, size].get("speed") for size in sizes if (arm, size) in cells}
        marks = [
            f"{size} {speed:.2f}x {'met' if speed >= GOAL_SPEED.get(size, 1.0) else 'MISSED'} ({GOAL_SPEED.get(size, 1.0)})"
            for size, speed in speeds.items()
            if speed is not None
        ]
        if marks:
            lines.append(f"goal, {arm}: {', '.join(marks)}")
    for arm in ("ours eager", "ours, tables too eager"):
        peaks = {each: cells.get((each, sizes[0]), {}).get("peak_bytes") for each in (arm, BASE, "fp32 eager")}
        for other, limit in ((BASE, GOAL_FP16), ("fp32 eager", GOAL_FP32)):
            if peaks[arm] and peaks[other]:
                ratio = peaks[arm] / peaks[other]
                verdict = "met" if ratio <= limit else "MISSED"
                lines.append(
                    f"goal, weights and peak activations at {sizes[0]}, {arm} over {other}: {ratio:.3f} {verdict} ({limit})"
                )
    return lines


def inputs(base: nn.Module, sizes: list[str]) -> dict[str, Tensor]:
    shapes = {size: tuple(map(int, size.split("x"))) for size in sizes}
    return {size: torch.randint(base.config.vocab_size, shape, device=DEVICE) for size, shape in shapes.items()}


def warm_caches(arms: list[str], sizes: list[str], *, small: bool) -> dict[tuple[str, str], str]:
    """Compile in processes side by side, so that this one finds it on disk -> (model, size) -> why that fails."""
    jobs = [(name, size) for name in MODELS for size in sizes if any(_compiles(arm, name) for arm in arms)]
    commands = [
        (
            "--warm",
            *(["--small"] if small else []),
            "--sizes",
            size,
            "--arms",
            *(arm for arm in arms if _compiles(arm, name)),
        )
        for name, size in jobs
    ]
    failed = zip(jobs, in_processes(__file__, commands, seconds=180), strict=True)
    return {job: why for job, why in failed if why is not None}


def _compiles(arm: str, name: str) -> bool:
    return ARMS[arm][0] == name and ARMS[arm][1] in COMPILED


def warm(arms: list[str], base: nn.Module, ids: dict[str, Tensor]) -> None:
    torch._inductor.config.compile_threads = 1  # as many processes as cores run beside this one
    model = MODELS[ARMS[arms[0]][0]](copy.deepcopy(base))
    for each in ids.values():
        model(each)
        for arm in arms:
            Runner(model, ARMS[arm][1], each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to check the script")
    parser.add_argument("--sizes", nargs="*", help=f"batch x length; default {' '.join(SIZES)}")
    parser.add_argument("--arms", nargs="*", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--no-compile", action="store_true", help="leave the arms with torch.compile out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300, help="compile no further arm after this long")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    modes = set(MODES.values()) - (set(COMPILED) if options.no_compile else set())
    modes -= {"graph"} if DEVICE == "cpu" else set()
    arms = [arm for arm in options.arms or ARMS if ARMS[arm][1] in modes]
    sizes = options.sizes or list(SMALL_SIZES if options.small else SIZES)
    torch._dynamo.config.recompile_limit = 64
    begin = time.perf_counter()
    base = bert(small=options.small)
    ids = inputs(base, sizes)
    with torch.no_grad():
        if options.warm:
            warm(arms, base, ids)
            return
        failed = {}
        if any(ARMS[arm][1] in COMPILED for arm in arms):
            failed = warm_caches(arms, sizes, small=options.small)
            print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
        base(ids[sizes[0]])
        copy.deepcopy(base).half()(ids[sizes[0]])  # the libraries' own workspaces are there before anything is counted
        names = dict.fromkeys(ARMS[arm][0] for arm in arms)
        builds = {name: build(name, base, ids) for name in names}
        rows, until = [], begin + options.seconds
        for size in sizes:
            rows += measure_size(size, arms, builds, base, ids[size], failed, rounds=options.rounds, until=until)
            print(f"{size} done at {time.perf_counter() - begin:.0f} s", flush=True)
            record.write("fp4_bert", rows, folder=options.out)  # after every size: a later one may fail
        if DEVICE == "cuda":
            add_attention(rows, builds, ids)
    path = record.write("fp4_bert", rows, folder=options.out)
    print(table(rows, sizes))
    print(path)


if __name__ == "__main__":
    main()
