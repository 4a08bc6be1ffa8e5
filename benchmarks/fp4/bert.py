"""BERT-base, whole forward, random weights: FP4 beside fp16, fp32 and bitsandbytes in time and in memory.

    python benchmarks/fp4/bert.py [--sizes 1x128 ...] [--arms NAME ...] [--no-compile] [--rounds 5] [--small] [--out FOLDER]

12 layers, width 768, 12 heads, 3072, vocabulary 30522, transformers' own model. Every arm attends through
`scaled_dot_product_attention` without a mask, as there is no padding: transformers itself makes one while it is compiled
or captured, which would hold those arms back. Latency is the wall time of one call, device and host, each waited for;
throughput that of calls in a row. Every arm is first compared with an fp32 model that has the arm's own dequantised
weights. Peak memory counts what the arm's weights and one eager forward need above what was there before.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.fp4 import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES, SMALL_SIZES = ("1x128", "8x128", "64x128", "64x512"), ("1x8", "2x16")
# Relative error of the last hidden states: fp16 through 12 layers.
LIMIT = 0.02
ROUND_S = 0.15
# What `ours` is to reach on an H200: speed over fp16 eager at these sizes, at the others above 1; memory at 1x128.
GOAL_SPEED, GOAL_FP16, GOAL_FP32 = {"1x128": 1.7, "8x128": 1.7}, 0.45, 0.2


def bert(*, small: bool) -> nn.Module:
    from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_no_mask", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_no_mask", lambda *_, **__: None)
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
}
BASE = "fp16 eager"
ARMS = {
    "fp32 eager": ("fp32", "eager"),
    BASE: ("fp16", "eager"),
    "fp16 CUDA graph": ("fp16", "graph"),
    "fp16 torch.compile": ("fp16", "compile"),
    "bitsandbytes fp4 eager": ("bitsandbytes fp4", "eager"),
    "bitsandbytes fp4 CUDA graph": ("bitsandbytes fp4", "graph"),
    "ours eager": ("ours", "eager"),
    "ours CUDA graph": ("ours", "graph"),
    "ours torch.compile": ("ours", "compile"),
    "ours, tables too, eager": ("ours, tables too", "eager"),
    "ours, tables too, CUDA graph": ("ours, tables too", "graph"),
}


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
        if mode == "compile":
            self.model = torch.compile(model, mode="reduce-overhead", dynamic=False)
        for _ in range(3):
            self()

    def __call__(self) -> Tensor:
        if self.mode == "graph":
            self.static.copy_(self.ids)
            self.graph.replay()
            return self.out
        if self.mode == "compile":
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


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass
class Built:
    """One model, and what it holds."""

    model: nn.Module | None
    why: str | None
    weight_bytes: int = 0
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)


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


def prepare(arms: list[str], builds: dict[str, Built], base: nn.Module, ids: Tensor) -> dict[str, tuple]:
    """Arm -> (runner, relative error, why not)."""
    found, expected = {}, {}
    for arm in arms:
        name, mode = ARMS[arm]
        built = builds[name]
        if built.model is None:
            found[arm] = (None, None, built.why)
            continue
        try:
            if name not in expected:
                expected[name] = exact_twin(built.model, base)(ids).last_hidden_state
            runner = Runner(built.model, mode, ids)
            error = float((runner().float() - expected[name]).norm() / expected[name].norm())
            right = error <= LIMIT
            found[arm] = (runner if right else None, error, None if right else f"WRONG NUMBERS: {error:.2g}")
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is what its row says
            if DEVICE == "cuda":
                torch.cuda.set_stream(torch.cuda.default_stream())
                torch.cuda.synchronize()
            found[arm] = (None, None, peers.why_of(error))
    return found


def measure_size(
    size: str, arms: list[str], builds: dict[str, Built], base: nn.Module, ids: Tensor, *, rounds: int
) -> list[dict]:
    ready = prepare(arms, builds, base, ids)
    single: dict[str, list[float]] = {arm: [] for arm in arms}
    series: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, (runner, _, _) in ready.items():
            if runner is not None:
                calls = max(5, min(50, int(ROUND_S / runner.in_a_row(2))))
                single[arm] += runner.latencies(calls)
                series[arm].append(runner.in_a_row(calls))
    rows = []
    for arm, (_, error, why) in ready.items():
        built = builds[ARMS[arm][0]]
        row = {"size": size, "arm": arm, "error": error, "weight_bytes": built.weight_bytes}
        row["peak_bytes"] = built.peak_bytes.get(size) if ARMS[arm][1] == "eager" else None
        if why is not None:
            row["why"] = why
        if single[arm]:
            middle = statistics.median(single[arm])
            low, *_, high = statistics.quantiles(single[arm], n=10)
            row |= {"ms": 1e3 * middle, "ms_tenth": 1e3 * low, "ms_nine_tenths": 1e3 * high}
            row |= {"ms_in_a_row": 1e3 * statistics.median(series[arm])}
            row["tokens_per_s"] = ids.numel() / statistics.median(series[arm])
            if single.get(BASE):
                row["speed"] = statistics.median(single[BASE]) / middle
        rows.append(row)
    return rows


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
    lines += [f"{row['arm']} {row['size']}: {row['why']}" for row in rows if row.get("why")]
    return "\n".join([*lines, *goals(cells, sizes)])


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
    for arm in ("ours eager", "ours, tables too, eager"):
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


def warm_caches(arms: list[str], sizes: list[str], *, small: bool) -> None:
    """Compile every arm that does in a process of its own, side by side, so that this process finds it on disk."""

    def one(job: tuple[str, str]) -> None:
        command = [
            sys.executable,
            __file__,
            "--warm",
            "--arms",
            job[0],
            "--sizes",
            job[1],
            *(["--small"] if small else []),
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, check=False, capture_output=True, timeout=240)  # noqa: S603

    jobs = [(arm, size) for arm in arms if ARMS[arm][1] == "compile" for size in sizes]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to check the script")
    parser.add_argument("--sizes", nargs="*", help=f"batch x length; default {' '.join(SIZES)}")
    parser.add_argument("--arms", nargs="*", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--no-compile", action="store_true", help="leave the arms with torch.compile out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    modes = {"eager", "graph", "compile"} - ({"compile"} if options.no_compile else set())
    modes -= {"graph"} if DEVICE == "cpu" else set()
    arms = [arm for arm in options.arms or ARMS if ARMS[arm][1] in modes]
    sizes = options.sizes or list(SMALL_SIZES if options.small else SIZES)
    torch._dynamo.config.recompile_limit = 64
    begin = time.perf_counter()
    base = bert(small=options.small)
    ids = inputs(base, sizes)
    with torch.no_grad():
        if options.warm:
            for arm in arms:
                model = MODELS[ARMS[arm][0]](copy.deepcopy(base))
                for each in ids.values():
                    Runner(model, ARMS[arm][1], each)
            return
        if any(ARMS[arm][1] == "compile" for arm in arms):
            warm_caches(arms, sizes, small=options.small)
            print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
        base(ids[sizes[0]])
        copy.deepcopy(base).half()(ids[sizes[0]])  # the libraries' own workspaces are there before anything is counted
        names = dict.fromkeys(ARMS[arm][0] for arm in arms)
        builds = {name: build(name, base, ids) for name in names}
        rows = []
        for size in sizes:
            rows += measure_size(size, arms, builds, base, ids[size], rounds=options.rounds)
            print(f"{size} done at {time.perf_counter() - begin:.0f} s", flush=True)
    print(table(rows, sizes))
    print(record.write("fp4_bert", rows, folder=options.out))


if __name__ == "__main__":
    main()
