"""One forward of 16 Llama-3-8B blocks whose weights stay in host memory: VGPU beside other libraries' offload.

    python benchmarks/vgpu/streaming.py [--tokens 1x1 1x2048 8x2048] [--arms NAME ...] [--rounds 7] [--small] [--out FOLDER]
    python benchmarks/vgpu/streaming.py --sweep       # 25, 50 and 75 % of the weights resident, over 1 to 16384 tokens
    python benchmarks/vgpu/streaming.py --plot FILE   # draw again what a sweep wrote

An arm is built, its output compared bit for bit with the same weights all in the GPU, and timed in turns with those, some
passes in a row, by the clock, host included: from a pass's output to that of the last, each waited for before the next pass
begins, as one that makes tokens does. What is copied ahead for the next pass is so counted where it is waited for. An arm
whose output differs in any bit, in its first pass, its second or the last timed one, reports no speed. The link is measured
before and after each arm; the faster figure counts.

Link efficiency is the bytes that a pass copies to the GPU, over its time, over the link's rate. The bytes are those of the
copies that PyTorch is seen to make in one pass, or, where it makes none, what VGPU says that it moved, or all weights. GPU
memory is the peak of a pass, the arm's weights included, its input not; host memory is the growth of what the machine has in
use, at its peak and when built. Allocator calls are those of one pass, less those of a pass without offload.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apt_model.vgpu.units import padded
from benchmarks import record
from benchmarks.fp4.cells import DEVICE, attempt, synchronize
from benchmarks.vgpu.stack_of_blocks import Stack, bytes_of, inputs_of, stack_of

SIZES, SMALL_SIZES = ("1x1", "1x2048", "8x2048"), ("1x1", "1x16", "2x16")
SWEEP_SIZES = ("1x1", "1x512", "1x2048", "1x4096", "1x8192", "1x16384")
SWEEP_SMALL_SIZES = ("1x1", "1x16", "1x64")
SHARES = (0.25, 0.5, 0.75)
GPU = "cuda:0" if DEVICE == "cuda" else "cpu"
MB = 1e6
# Room for blocks on their way, and what a level needs beside its windows.
SLOTS, SPARE_MB, SMALL_SPARE_MB = 3, 64, 1
ALIGNMENT = 512
# Passes in a row that one figure is of, and where a pass is long as many as take so long. A GPU at the limit of its power changes its clock once or
# twice a second (an H100 at 690 W: 1440 to 1740 MHz), and single passes of 126 ms with it, by 12 %.
IN_A_ROW, ROW_S, LONG_S = 3, 1.5, 0.05
# All passes of one arm at one size take no longer than this, but for two rows of them.
CELL_S, FEWEST_ROUNDS = 3.0, 2
# Those of an H200: link efficiency at 1 token, time over all in GPU at 8x2048, time over max(compute, link), FP4 seconds.
GOAL_LINK, GOAL_SLOWER, GOAL_BOUND, GOAL_FP4_S = 0.985, 1.02, 1.03, 0.037


@dataclasses.dataclass
class Options:
    """What a run was asked for."""

    blocks: int
    rounds: int
    small: bool


@dataclasses.dataclass
class Offloaded:
    """A model that takes its weights from elsewhere, and what there is to say about it."""

    model: nn.Module
    moved: Callable[[], int] | None = None  # bytes to the GPU so far, where it counts them itself
    facts: Callable[[], dict] = dict


@contextlib.contextmanager
def in_gpu(model: Stack, _: Options) -> Iterator[Offloaded]:
    yield Offloaded(model, lambda: 0)


@contextlib.contextmanager
def accelerate(model: Stack, _: Options) -> Iterator[Offloaded]:
    from accelerate import cpu_offload

    yield Offloaded(cpu_offload(model, execution_device=torch.device(GPU)))


@contextlib.contextmanager
def diffusers(model: Stack, _: Options) -> Iterator[Offloaded]:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model.cpu(), onload_device=torch.device(GPU), offload_type="block_level", num_blocks_per_group=1,
        use_stream=True, record_stream=True, non_blocking=True,
    )  # fmt: skip
    yield Offloaded(model)


def fsdp2(*, prefetch: bool) -> Callable:
    """One rank; with `prefetch` each block asks for the next itself, before its own products are launched."""

    @contextlib.contextmanager
    def build(model: Stack, _: Options) -> Iterator[Offloaded]:
        from torch import distributed
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        with tempfile.TemporaryDirectory() as folder:
            store = distributed.FileStore(f"{folder}/store", 1)
            distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
            try:
                for block in model.blocks:
                    fully_shard(block, offload_policy=CPUOffloadPolicy(pin_memory=True))
                fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=True))
                if prefetch:
                    for block, following in zip(model.blocks, model.blocks[1:], strict=False):
                        block.set_modules_to_forward_prefetch([following])
                yield Offloaded(model)
            finally:
                distributed.destroy_process_group()

    return build


class StaticBuffers:
    """The control: pinned blobs, three slots in the GPU with parameters that point there, one stream of copies, events."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        sizes = [sum(padded(each.nbytes, ALIGNMENT) for each in block.parameters()) for block in blocks]
        self.slots = [torch.empty(max(sizes), dtype=torch.uint8, device=GPU) for _ in range(SLOTS)]
        self.blobs = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        self.stream = torch.cuda.Stream()
        self.copied, self.used = ([torch.cuda.Event() for _ in each] for each in (blocks, self.slots))
        for i, block in enumerate(blocks):
            begin = 0
            for parameter in block.parameters():
                end = begin + parameter.nbytes
                self.blobs[i][begin:end].copy_(parameter.data.flatten().view(torch.uint8))
                window = self.slots[i % SLOTS][begin:end]
                parameter.data = window.view(parameter.dtype).view(parameter.shape)
                begin += padded(parameter.nbytes, ALIGNMENT)
            block.register_forward_pre_hook(self.before(i))
            block.register_forward_hook(self.after(i))
        for i in range(SLOTS):
            self.used[i].record()
            self.fetch(i)

    def fetch(self, i: int) -> None:
        slot = i % SLOTS
        self.stream.wait_event(self.used[slot])
        with torch.cuda.stream(self.stream):
            self.slots[slot][: self.blobs[i].numel()].copy_(self.blobs[i], non_blocking=True)
            self.copied[i].record()

    def before(self, i: int) -> Callable:
        return lambda *_: torch.cuda.current_stream().wait_event(self.copied[i])

    def after(self, i: int) -> Callable:
        following = i + SLOTS if i + SLOTS < len(self.blobs) else i % SLOTS

        def hook(*_: object) -> None:
            self.used[i % SLOTS].record()
            self.fetch(following)

        return hook


@contextlib.contextmanager
def static_buffers(model: Stack, options: Options) -> Iterator[Offloaded]:
    if options.blocks < SLOTS:
        raise ValueError(f"expected {SLOTS} blocks at least, got {options.blocks}")
    StaticBuffers(model.blocks)
    yield Offloaded(model)


def ours(resident: float = 0.0) -> Callable:
    """VGPU over two levels; the first has room for a share of the weights beside the blocks on their way."""

    @contextlib.contextmanager
    def build(model: Stack, options: Options) -> Iterator[Offloaded]:
        from apt_model.optimization import VGPUStack

        model.cpu()
        weights, spare = bytes_of(model) / MB, SMALL_SPARE_MB if options.small else SPARE_MB
        first = resident * weights + SLOTS * weights / options.blocks + spare
        second = weights + weights / options.blocks + spare
        levels = [
            {"capacity_mb": math.ceil(first), "device": GPU},
            {"capacity_mb": math.ceil(second), "device": "cpu"},
        ]
        stack = VGPUStack.from_config({"levels": levels})
        try:
            stack.attach(model)
            yield Offloaded(
                model, lambda: stack.stats()["levels"][0]["bytes_in"], lambda: {"levels": levels, "stats": plain(stack)}
            )
            stack.detach(model)
        finally:
            stack.close()

    return build


def plain(stack: object) -> object:
    """Its statistics as JSON holds them."""
    return json.loads(json.dumps(stack.stats(), default=lambda each: getattr(each, "__dict__", None) or str(each)))


@dataclasses.dataclass(frozen=True)
class Arm:
    """How a model is offloaded; `base` holds the same weights in the GPU."""

    build: Callable
    base: str
    fp4: bool = False
    needs_cuda: bool = True
    usual: bool = True  # else only where asked for


BASE, BASE_FP4, OURS, OURS_FP4, FSDP2 = "all in GPU", "all in GPU, FP4", "ours", "ours, FP4", "FSDP2 CPU offload"
ARMS = {
    BASE: Arm(in_gpu, BASE, needs_cuda=False),
    "accelerate cpu_offload": Arm(accelerate, BASE),
    "diffusers group offload": Arm(diffusers, BASE),
    FSDP2: Arm(fsdp2(prefetch=False), BASE),
    "FSDP2 CPU offload, prefetch asked for": Arm(fsdp2(prefetch=True), BASE, usual=False),
    "plain static buffers": Arm(static_buffers, BASE),
    OURS: Arm(ours(), BASE, needs_cuda=False),
    BASE_FP4: Arm(in_gpu, BASE_FP4, fp4=True, needs_cuda=False),
    OURS_FP4: Arm(ours(), BASE_FP4, fp4=True, needs_cuda=False),
}
BASES = (BASE, BASE_FP4)


def resident_arm(share: float) -> tuple[str, Arm]:
    return f"{OURS}, {share:.0%} resident", Arm(ours(share), BASE, needs_cuda=False)


def model_of(*, fp4: bool, options: Options) -> Stack:
    model = stack_of(options.blocks, GPU, small=options.small)
    if fp4:
        from apt_model.optimization import FP4Config, quantize

        model = quantize(model, FP4Config(format="nvfp4", skip=()), report=lambda _: None)
    return model


class CopiedToGPU(TorchDispatchMode):
    """Counts the bytes that PyTorch copies from the host to the GPU."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found, pairs = func(*args, **(kwargs or {})), []
        if func is torch.ops.aten.copy_.default:
            pairs = [(args[1], args[0])]
        elif func is torch.ops.aten._to_copy.default:
            pairs = [(args[0], found)]
        elif func is torch.ops.aten._foreach_copy_.default:
            pairs = list(zip(args[1], args[0], strict=True))
        self.nbytes += sum(target.nbytes for source, target in pairs if target.is_cuda and not source.is_cuda)
        return found


class HostMemory:
    """Growth of what the machine has in use, pinned memory included: its peak by samples, and what stays."""

    def __init__(self) -> None:
        self.before, self.peak, self.stopped = self.used(), 0, threading.Event()
        self.before_process = self.of_process()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self.now = self.used() - self.before
        self.peak = max(self.peak, self.now)
        self.process = self.of_process() - self.before_process

    def watch(self) -> None:
        while not self.stopped.wait(0.05):
            self.peak = max(self.peak, self.used() - self.before)

    @staticmethod
    def used() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * (found["MemTotal"] - found["MemAvailable"])

    @staticmethod
    def of_process() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def timed(call: Callable, x: tuple[Tensor, ...]) -> tuple[float, Tensor]:
    synchronize()
    begin = time.perf_counter()
    out = call(*x)
    synchronize()
    return time.perf_counter() - begin, out


def output_ready() -> None:
    """Wait for what the default stream was given, and not for copies on others."""
    if DEVICE == "cuda":
        torch.cuda.current_stream().synchronize()


@torch.no_grad()
def seconds_in_a_row(call: Callable, x: tuple[Tensor, ...], count: int = IN_A_ROW) -> tuple[float, Tensor]:
    """Of one pass, in the middle of others like it: the mean of `count`."""
    synchronize()
    out = call(*x)
    output_ready()
    begin = time.perf_counter()
    for _ in range(count):
        del out
        out = call(*x)
        output_ready()
    seconds = (time.perf_counter() - begin) / count
    synchronize()
    return seconds, out


def allocator_calls() -> dict[str, int]:
    """So far: tensors asked for, pieces of memory taken for them, and times that there was none."""
    if DEVICE != "cuda":
        return {}
    found = torch.cuda.memory_stats()
    keys = ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries")
    return dict(zip(("allocations", "segments", "retries"), map(found.get, keys), strict=True))


def copied_bytes(offloaded: Offloaded, x: tuple[Tensor, ...]) -> tuple[int, int | None]:
    """Of one pass: what PyTorch is seen to copy to the GPU, and what the arm says that it moved."""
    before = offloaded.moved and offloaded.moved()
    with CopiedToGPU() as found:
        timed(offloaded.model, x)
    return found.nbytes, offloaded.moved and offloaded.moved() - before


def release() -> int:
    """Give back what is free, on both sides -> bytes that tensors hold in the GPU."""
    gc.collect()
    if DEVICE != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for holder, name in ((torch._C, "_host_emptyCache"), (torch.accelerator.memory, "empty_host_cache")):
        if hasattr(holder, name):
            getattr(holder, name)()
            break
    return torch.cuda.memory_allocated()


def rounds(
    call: nn.Module, base: nn.Module, x: tuple[Tensor, ...], count: int, in_a_row: int
) -> tuple[list[float], list[float], Tensor, dict[str, int]]:
    """In turns, each round from the other on -> seconds of both, the last output, allocator calls more in the last pass."""
    seconds, calls, last = {"arm": [], "base": []}, {}, None
    gc.disable()
    try:
        for number in range(count):
            order = [("arm", call), ("base", base)]
            for key, each in order if number % 2 else reversed(order):
                last = None if key == "arm" else last
                before = allocator_calls()
                second, out = seconds_in_a_row(each, x, in_a_row)
                done = allocator_calls().items()
                calls[key] = {name: (after - before[name]) / (1 + in_a_row) for name, after in done}
                seconds[key].append(second)
                last = out if key == "arm" else last
                del out
    finally:
        gc.enable()
    extra = {name: number - calls["base"][name] for name, number in calls["arm"].items()}
    return seconds["arm"], seconds["base"], last, extra


def link_bytes_per_s() -> float | None:
    """Pinned host memory to the GPU, 1 GiB at a time: the median of 20."""
    if DEVICE != "cuda":
        return None
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=GPU)
    seconds = [
        record.gpu_seconds(lambda: target.copy_(source, non_blocking=True), repeat=1, warm_up=0) for _ in range(23)
    ]
    return source.nbytes / statistics.median(seconds[3:])


class Run:
    """The inputs, the models that stay in the GPU, and the rows so far."""

    def __init__(self, sizes: list[str], options: Options) -> None:
        self.options, self.rows, self.links = options, [], []
        self.inputs = {size: inputs_of(size, GPU, small=options.small) for size in sizes}
        self.bases: dict[str, nn.Module] = {}
        self.base_bytes: dict[str, int] = {}
        self.expected: dict[tuple[str, str], Tensor] = {}
        self.measure_link()

    def measure_link(self) -> None:
        self.links.append(link_bytes_per_s())
        release()

    def base(self, name: str) -> nn.Module:
        if name not in self.bases:
            before = release()
            model = model_of(fp4=ARMS[name].fp4, options=self.options)
            for x in self.inputs.values():
                timed(model, x)
            self.bases[name], self.base_bytes[name] = model, release() - before
            self.expected |= {(name, size): timed(model, x)[1] for size, x in self.inputs.items()}
        return self.bases[name]

    def arm(self, name: str, arm: Arm) -> None:
        """Build, compare, time and tear down."""
        begin, before = time.perf_counter(), len(self.rows)
        links = self.links[-1:]
        _, why = attempt(self.measure, name, arm)
        measured = {row["tokens"] for row in self.rows[before:]}
        if why is not None:
            self.rows += [{"arm": name, "tokens": size, "why": why} for size in self.inputs if size not in measured]
        release()
        self.measure_link()
        self.judge(self.rows[before:], [each for each in [*links, self.links[-1]] if each])
        print(f"{name}: {time.perf_counter() - begin:.0f} s, {why or 'ran'}")
        print("\n".join(table(self.rows[before:]).splitlines()[2:]), flush=True)  # a later arm may end the run

    def measure(self, name: str, arm: Arm) -> None:
        base = self.base(arm.base)
        before, begin = release(), time.perf_counter()
        with contextlib.ExitStack() as exits:
            host = HostMemory()
            with host:
                if name in BASES:
                    model, before = base, before - self.base_bytes[name]
                else:
                    model = model_of(fp4=arm.fp4, options=self.options)
                weight_bytes = bytes_of(model)
                offloaded = exits.enter_context(arm.build(model, self.options))
                del model
                synchronize()
                release()
            facts = {
                "arm": name, "weight_bytes": weight_bytes, "build_s": time.perf_counter() - begin,
                "host_peak_bytes": host.peak, "host_bytes": host.now, "host_process_bytes": host.process,
            }  # fmt: skip
            for size in self.inputs:
                found, why = attempt(self.measure_size, offloaded, weight_bytes, arm.base, size, before)
                self.rows.append(facts | {"tokens": size} | (found or {"why": why}))
            said, why = attempt(offloaded.facts)
            self.rows[-1] |= said or {} if why is None else {"stats": why}

    def measure_size(self, offloaded: Offloaded, weight_bytes: int, beside: str, size: str, before: int) -> dict:
        call, base, x, expected = offloaded.model, self.bases[beside], self.inputs[size], self.expected[beside, size]
        equal, found = [torch.equal(timed(call, x)[1], expected)], {"peak_gpu_bytes": None}
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        once, out = timed(call, x)
        if DEVICE == "cuda":
            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() - before
        equal.append(torch.equal(out, expected))
        del out
        in_a_row = max(IN_A_ROW, int(ROW_S / once)) if once > LONG_S else IN_A_ROW
        count = max(FEWEST_ROUNDS, min(self.options.rounds, int(CELL_S / once / (1 + in_a_row))))
        seconds, seconds_base, last, extra = rounds(call, base, x, count, in_a_row)
        found |= {f"extra_{key}": number for key, number in extra.items()}
        seen, said = attempt(copied_bytes, offloaded, x)[0] or (0, None)
        streamed = seen or (weight_bytes if said is None else said)
        found |= {"bytes_streamed": streamed, "bytes_seen": seen, "bytes_said": said}
        found["resident_share"] = 1 - streamed / weight_bytes
        found["equal"] = all([*equal, torch.equal(last, expected)])
        if not found["equal"]:
            difference = float((last.float() - expected.float()).norm() / expected.float().norm())
            return found | {"why": f"WRONG NUMBERS: not the bits of {beside}, relative error {difference:.2g}"}
        low, middle, high = statistics.quantiles(seconds, n=4)
        found |= {"seconds": middle, "seconds_quarter": low, "seconds_three_quarters": high, "rounds": seconds}
        found["base_seconds"] = statistics.median(seconds_base)
        return found | {"slower": middle / found["base_seconds"]}

    @staticmethod
    def judge(rows: list[dict], links: list[float]) -> None:
        """What needs the link's rate."""
        for row in rows:
            if not links or "seconds" not in row:
                continue
            row |= {"link_bytes_per_s": max(links), "links": links}
            if row["bytes_streamed"]:
                row["link_s"] = row["bytes_streamed"] / max(links)
                row["link_efficiency"] = row["link_s"] / row["seconds"]
                row["bound_s"] = max(row["link_s"], row["base_seconds"])
                row["over_bound"] = row["seconds"] / row["bound_s"]


def said_so(row: dict) -> str:
    """Whose word the bytes are, where PyTorch was seen to copy none."""
    if row["bytes_seen"] or not row["bytes_streamed"]:
        return ""
    return " (supposed)" if row["bytes_said"] is None else " (its word)"


def table(rows: list[dict]) -> str:
    heads = ["tokens", "arm", "s a pass (quarters)", "over all in GPU", "GB copied", "link efficiency"]
    heads += ["over max(compute, link)", "peak GPU GiB", "host GiB (peak)", "extra allocator calls", "same bits"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        start = f"| {row['tokens']} | {row['arm']} | "
        if "why" in row:
            lines.append(f"{start}{row['why']} |" + " |" * 8)
            continue
        peak = f"{row['peak_gpu_bytes'] / 2**30:.2f}" if row["peak_gpu_bytes"] is not None else "-"
        ratios = [f"{row[key]:.3f}" if key in row else "-" for key in ("link_efficiency", "over_bound")]
        lines.append(
            f"{start}{row['seconds']:.4f} ({row['seconds_quarter']:.4f}, {row['seconds_three_quarters']:.4f}) "
            f"| {row['slower']:.3f}x | {row['bytes_streamed'] / 1e9:.2f}{said_so(row)} "
            f"| {' | '.join(ratios)} | {peak} | {row['host_bytes'] / 2**30:.1f} ({row['host_peak_bytes'] / 2**30:.1f}) "
            f"| {row.get('extra_allocations', '-')} | {'yes' if row['equal'] else 'NO'} |"
        )
    return "\n".join(lines)


def goals(rows: list[dict]) -> str:
    """Each goal with what was reached and, where it was measured, FSDP2's figure; they are those of an H200."""
    if DEVICE != "cuda":
        return "goals are not judged: no GPU, no link"
    cells = {(row["arm"], row["tokens"]): row for row in rows}
    wanted = [
        (OURS, "1x1", "link_efficiency", "link efficiency", ">=", GOAL_LINK),
        (OURS, "8x2048", "slower", "time over all in GPU", "<=", GOAL_SLOWER),
        (OURS_FP4, "1x1", "seconds", "seconds", "<=", GOAL_FP4_S),
    ]
    for share in SHARES:
        name = resident_arm(share)[0]
        sizes = [size for arm, size in cells if arm == name]
        wanted += [(name, size, "over_bound", "time over max(compute, link)", "<=", GOAL_BOUND) for size in sizes]
    lines = []
    for name, size, key, what, sign, goal in wanted:
        row = cells.get((name, size))
        if row is None:
            continue
        value, peer = row.get(key), cells.get((FSDP2, size), {}).get(key)
        met = value is not None and (value >= goal if sign == ">=" else value <= goal)
        reached = f"{value:.4f}" if value is not None else f"nothing ({row['why']})"
        beside = f" (FSDP2 {peer:.4f})" if peer is not None and name == OURS else ""
        lines.append(f"{'met   ' if met else 'MISSED'} {name}, {size}: {what} {sign} {goal}: {reached}{beside}")
    return "\n".join(lines)


def draw(found: dict, path: Path) -> None:
    """Time against tokens, one panel a share, under what is the least: the slower of compute and link."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row | {"count": math.prod(map(int, row["tokens"].split("x")))} for row in found["rows"] if "seconds" in row]
    names = [resident_arm(share)[0] for share in SHARES]
    names = [name for name in names if any(row["arm"] == name for row in rows)]
    if not names:
        return
    figure, panels = plt.subplots(
        1, len(names), figsize=(4.4 * len(names), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, name in zip(panels.flat, names, strict=True):
        points = sorted((row for row in rows if row["arm"] == name), key=lambda row: row["count"])
        counts = [row["count"] for row in points]
        axes.plot(
            counts, [row["base_seconds"] for row in points], ":", color="black", lw=1, label="compute: all in GPU"
        )
        if all("link_s" in row for row in points):
            axes.plot(
                counts, [row["link_s"] for row in points], "--", color="#7f7f7f", lw=1, label="link: bytes / rate"
            )
            bound = [row["bound_s"] for row in points]
            axes.plot(counts, bound, color="#1f77b4", lw=1.2, label="max(compute, link)")
        axes.plot(counts, [row["seconds"] for row in points], "o", color="#d62728", markersize=5, label="measured")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts], rotation=45)
        axes.minorticks_off()
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("tokens in the pass")
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel("seconds a pass")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    machine, gb = found["machine"], rows[0]["weight_bytes"] / 1e9
    versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "driver") if key in machine)
    figure.suptitle(f"Decoder blocks of {gb:.3g} GB, {machine['device']} ({versions})", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to check the script without a GPU")
    parser.add_argument("--tokens", nargs="*", help=f"batch x length; default {' '.join(SIZES)}")
    parser.add_argument("--arms", nargs="*", help=f"of {', '.join(ARMS)}")
    parser.add_argument(
        "--rounds", type=int, default=7, help=f"fewer where {CELL_S:.0f} s are over, but {FEWEST_ROUNDS}"
    )
    parser.add_argument("--blocks", type=int, help="default 16; 6 with --small")
    parser.add_argument("--sweep", action="store_true", help="shares of the weights resident, and a plot, instead")
    parser.add_argument("--plot", type=Path, help="draw this sweep's JSON again, and do nothing else")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    given = parser.parse_args()
    if given.plot:
        draw(json.loads(given.plot.read_text()), given.plot.with_suffix(".png"))
        return
    if unknown := [name for name in given.arms or () if name not in ARMS]:
        parser.error(f"--arms: expected some of {list(ARMS)}, got {unknown}")
    arms = {name: arm for name, arm in ARMS.items() if (name in given.arms if given.arms else arm.usual)}
    if given.sweep:
        arms = dict(map(resident_arm, SHARES))
    usual = (
        (SWEEP_SMALL_SIZES if given.small else SWEEP_SIZES) if given.sweep else SMALL_SIZES if given.small else SIZES
    )
    begin = time.perf_counter()
    if left_out := [name for name, arm in arms.items() if arm.needs_cuda and DEVICE != "cuda"]:
        print(f"left out, as they need CUDA: {', '.join(left_out)}")
    run = Run(
        given.tokens or list(usual), Options(given.blocks or (6 if given.small else 16), given.rounds, given.small)
    )
    for name, arm in arms.items():
        if name not in left_out:
            run.arm(name, arm)
    print(f"\n{table(run.rows)}\n\n{goals(run.rows)}\n")
    if any(run.links):
        print(f"link, GB/s: {', '.join(f'{each / 1e9:.2f}' for each in run.links)}")
    path = record.write("vgpu_streaming_sweep" if given.sweep else "vgpu_streaming", run.rows, folder=given.out)
    if given.sweep:
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(f"{path}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
