"""What a plan says, beside what then happens: peak of each level, time of a pass, what fits and what is refused.

    python benchmarks/vgpu/plan_cells.py [--small] [--budget SECONDS] [--models NAME ...] [--rates FILE] [--out FOLDER]

The rates are measured first, as `apt-model plan --measure` does, or read from --rates. A cell is a model, capacities and
tokens: it is laid out and predicted before the model is attached; passes are then timed as streaming.py times them, by the
clock and in a row. A model is built once, on the GPU, and attached once for all cells with the same capacities. Cells of
`least` attach with the smallest level 1 that a plan is said to work with, and those of `refused` with a page less.

What a host and a disk do in a second changes from one minute to the next on a shared machine, and by more than a plan may
be off. So the host's launches, and the disk where there is one, are measured again right before and after each cell, and
the row says the prediction with those rates, too.

Rows are written after each cell, so that a run that is ended loses nothing; --budget ends it in time by itself.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from apt_model.core.errors import CapacityError
from apt_model.core.system import get_device_manager
from apt_model.optimization import FP4Config, VGPUStack, quantize
from apt_model.vgpu import rates as rates_file
from apt_model.vgpu.least import least_device
from apt_model.vgpu.machine import measure, measure_lanes
from apt_model.vgpu.measure import Probe
from apt_model.vgpu.modules import buffer_bytes, tree_of
from apt_model.vgpu.predict import Forecast
from apt_model.vgpu.units import MB, PAGE
from apt_model.vgpu.work import facts_of
from benchmarks import record
from benchmarks.vgpu import stack_of_blocks
from benchmarks.vgpu.streaming import DEVICE, GPU, release, seconds_in_a_row

SLOTS, CELL_S, ROUNDS, PROBE_S = 3, 1.2, 5, 0.05
NEAR_TIME, NEAR_PEAK = 0.10, 0.03


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model, and the cells that it is in."""

    build: Callable  # (small) -> the model on the device, its configuration
    inputs: Callable  # (size, small) -> arguments of a forward
    shares: tuple[float, ...]
    sizes: tuple[str, ...]
    disk: tuple[tuple[float, float], ...] = ()
    """Shares of level 1 and of host memory, with a disk below."""
    disk_sizes: tuple[str, ...] = ()


def llama(small, *, fp4=False):
    config = stack_of_blocks.config_of(small=small)
    model = stack_of_blocks.stack_of(4 if small else 16, GPU, small=small).to(dtype_of(small))
    if fp4:
        model = quantize(model, FP4Config(format="nvfp4", skip=()), report=lambda _: None)
    return model, {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}


def dtype_of(small):
    """Many CPUs take long for bf16."""
    return torch.float32 if small else torch.bfloat16


def llama_inputs(size, small):
    return tuple(each.to(dtype_of(small)) for each in stack_of_blocks.inputs_of(size, GPU, small=small))


def of_transformers(kind, config, *, small):
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(small))
    try:
        with torch.device(GPU):
            return kind(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def gpt2(small):
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4} if small else {"n_embd": 2560, "n_layer": 20, "n_head": 20}
    config = GPT2Config(
        **sizes,
        bos_token_id=0,
        eos_token_id=0,
        vocab_size=8192,
        n_positions=2048,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return of_transformers(GPT2Model, config, small=small), {**config.to_dict(), "architectures": ["GPT2LMHeadModel"]}


def bert(small):
    from transformers import BertConfig, BertModel

    width, heads, layers = (256, 4, 4) if small else (2048, 16, 24)
    config = BertConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads,
        num_hidden_layers=layers, attn_implementation="sdpa",
    )  # fmt: skip
    return of_transformers(BertModel, config, small=small), config.to_dict()


def ids(size, _small) -> tuple[Tensor]:
    batch, length = map(int, size.split("x"))
    torch.manual_seed(1)
    return (torch.randint(8192, (batch, length), device=GPU),)


def kinds(small: bool) -> dict[str, Kind]:
    def sizes(large, little):
        return little if small else large

    return {
        "llama": Kind(llama, llama_inputs, sizes((0.25, 0.45, 0.65, 0.9), (0.6, 0.9)),
                      sizes(("1x1", "1x512", "1x2048", "4x2048", "8x2048"), ("1x1", "2x64"))),
        "gpt2": Kind(gpt2, ids, sizes((0.2, 0.5, 0.8), (0.5,)), sizes(("1x1", "1x1024", "8x1024"), ("1x1", "2x64"))),
        "bert": Kind(bert, ids, sizes((0.2, 0.5, 0.8), (0.5,)), sizes(("1x128", "8x512", "32x512"), ("1x8", "2x64")),
                     sizes(((0.2, 0.3), (0.5, 0.2)), ((0.5, 0.2),)), sizes(("1x128", "32x512"), ("1x8",))),
        "llama fp4": Kind(lambda small: llama(small, fp4=True), llama_inputs, sizes((0.3, 0.6), (0.6,)),
                          sizes(("1x1", "1x2048", "8x2048"), ("1x1",))),
    }  # fmt: skip


class Run:
    """The rates, and the rows so far."""

    def __init__(self, given) -> None:
        self.given, self.begin, self.rows = given, time.perf_counter(), []
        self.device = get_device_manager(DEVICE)
        self.above = record.header()
        self.rates = (
            rates_file.read(given.rates) if given.rates else measure(self.device, ["F32" if given.small else "BF16"])
        )
        self.above["rates"] = dataclasses.asdict(self.rates)
        self.path = None

    def late(self) -> bool:
        return self.given.budget is not None and time.perf_counter() - self.begin > self.given.budget

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.path = record.write("vgpu_plan", self.rows, folder=self.given.out, above=self.above)
        print(shown(row), flush=True)

    def model(self, name: str, kind: Kind) -> None:
        model, config = kind.build(self.given.small)
        facts, total = facts_of(config), tree_of(model).nbytes
        inputs = {size: kind.inputs(size, self.given.small) for size in dict.fromkeys((*kind.sizes, *kind.disk_sizes))}
        for levels, sizes, what in self.capacities(kind, model, total):
            if self.late():
                print(f"out of time before {name}, {what}")
                break
            cell = {"model": name, "what": what, "weights_mb": total / MB, "levels_mb": [mb for _, mb in levels]}
            try:
                self.attached(cell, model, facts, levels, {size: inputs[size] for size in sizes})
            except torch.OutOfMemoryError as error:
                self.add({**cell, "why": f"{type(error).__name__}: {error}"[:200]})
        del model, inputs
        gc.collect()
        release()

    @staticmethod
    def capacities(kind: Kind, model: nn.Module, total: int) -> Iterator[tuple[list, tuple[str, ...], str]]:
        whole = 1.3 * total / MB + 10
        for share in kind.shares:
            yield [(GPU, share * total / MB), ("cpu", whole)], kind.sizes, f"{share:.0%} on level 1"
        for first, second in kind.disk:
            levels = [(GPU, first * total / MB), ("cpu", second * total / MB), ("ssd", whole)]
            yield levels, kind.disk_sizes, f"{first:.0%} on level 1, {second:.0%} in host memory, a disk"
        least = least_device(tree_of(model), buffer_bytes(model), SLOTS)
        yield [(GPU, least / MB), ("cpu", whole)], kind.sizes[:1], "least"
        yield [(GPU, (least - PAGE) / MB), ("cpu", whole)], kind.sizes[:1], "refused"

    def attached(self, cell: dict, model: nn.Module, facts, levels: list, inputs: dict) -> None:
        config = {"slots": SLOTS, "levels": [{"device": kind, "capacity_mb": mb} for kind, mb in levels]}
        with VGPUStack(config) as stack:
            try:
                layout = stack._layout(model)
            except CapacityError:
                layout = None
            said = layout is not None
            try:
                stack.attach(model)
            except CapacityError:
                self.add({**cell, "said_to_fit": said, "fits": False})
                return
            try:
                if layout is None:
                    self.add({**cell, "said_to_fit": False, "fits": True})
                    return
                planned = [layout.plan.device_bytes, layout.plan.host_bytes, layout.plan.disk_bytes][: len(levels)]
                forecast = Forecast(layout, facts, self.rates, dtype_of(self.given.small).itemsize)
                for size, x in inputs.items():
                    if self.late():
                        return
                    row = {**cell, "tokens": size, "said_to_fit": True, "fits": True, "slots": layout.plan.slots,
                           "planned_mb": [each / MB for each in planned]}  # fmt: skip
                    before = self.rates_now(disk=len(levels) > 2)
                    found = self.timed(stack, model, forecast, size, x)
                    after = self.rates_now(disk=len(levels) > 2)
                    now = {name: (value + after[name]) / 2 for name, value in before.items()}
                    again = Forecast(
                        layout, facts, dataclasses.replace(self.rates, **now), dtype_of(self.given.small).itemsize
                    )
                    self.add(row | found | {"now": now, "said_now_s": again.predict(*tokens_of(size)).pass_s})
            finally:
                stack.detach(model)

    def rates_now(self, *, disk: bool) -> dict[str, float]:
        """Those that change while others use the machine, too."""
        launch = Probe(self.device, 0, PROBE_S).launch(dtype_of(self.given.small))
        found = {"launch_s": launch, "hook_s": self.rates.hook_s * launch / self.rates.launch_s}
        if disk:  # of another stack: this one's peak is judged
            found["disk_gbps"] = measure_lanes(self.device)[1]
        return found

    @staticmethod
    def timed(stack: VGPUStack, model: nn.Module, forecast: Forecast, size: str, x: tuple[Tensor, ...]) -> dict:
        said = forecast.predict(*tokens_of(size))
        before = stack.stats()["levels"][0]["bytes_in"]
        begin = time.perf_counter()
        seconds_in_a_row(model, x)
        once = time.perf_counter() - begin  # four passes, cold
        moved = stack.stats()["levels"][0]["bytes_in"] - before
        count = max(1, min(ROUNDS, int(CELL_S / once)))  # of four passes each
        seconds = [seconds_in_a_row(model, x)[0] for _ in range(count)]
        found = {f"said_{name}": value for name, value in dataclasses.asdict(said).items()}
        return found | {
            "seconds": statistics.median(seconds), "all_seconds": seconds, "moved_mb_a_pass": moved / 4 / MB,
            "peak_mb": [level["peak_mb"] for level in stack.stats()["levels"]],
        }  # fmt: skip


def tokens_of(size: str) -> tuple[int, int]:
    """All, and those of a sequence."""
    batch, length = map(int, size.split("x"))
    return batch * length, length


def off(row: dict, said: str = "said_pass_s") -> float:
    """How far a prediction is from the time."""
    return row[said] / row["seconds"] - 1


def peaks_off(row: dict) -> float:
    """The largest such difference of a level."""
    pairs = zip(row["planned_mb"], row["peak_mb"], strict=True)
    return max((abs(said / peak - 1) if peak else float(said > 0)) for said, peak in pairs)


def shown(row: dict) -> str:
    start = f"{row['model']:9s} {row['what']:44s} {row.get('tokens', ''):7s}"
    if "seconds" not in row:
        fits = "fits" if row.get("fits") else "refused"
        return f"{start} {row.get('why') or fits + (', as said' if row['said_to_fit'] == row['fits'] else ', NOT AS SAID')}"
    return (
        f"{start} {row['seconds']:8.4f} s, said {row['said_pass_s']:8.4f} ({off(row):+7.1%}, {row['said_bound']}; "
        f"with the rates around it {off(row, 'said_now_s'):+7.1%}), "
        f"peaks within {peaks_off(row):.2%}"
    )


def summary(rows: list[dict]) -> str:
    timed = [row for row in rows if "seconds" in row]
    lines = []
    if timed:
        peaks = sum(peaks_off(row) <= NEAR_PEAK for row in timed)
        for key, what in (("said_pass_s", "measured first"), ("said_now_s", "around the cell")):
            near = sum(abs(off(row, key)) <= NEAR_TIME for row in timed)
            lines.append(f"{near} of {len(timed)} cells within {NEAR_TIME:.0%} of time with the rates {what}")
        lines.append(f"{peaks} of {len(timed)} cells ({peaks / len(timed):.0%}) within {NEAR_PEAK:.0%} of the peaks")
        for bound in ("link", "disk", "compute"):
            errors = sorted(abs(off(row, "said_now_s")) for row in timed if row["said_bound"] == bound)
            if errors:
                near = sum(error <= NEAR_TIME for error in errors)
                lines.append(f"  bound by {bound}: {near} of {len(errors)} cells, off by {statistics.median(errors):.1%} in the "
                             f"middle, {errors[-1]:.1%} at most, with the rates around them")  # fmt: skip
    judged = [row for row in rows if "fits" in row]
    false = [row for row in judged if row["said_to_fit"] and not row["fits"]]
    missed = [row for row in judged if not row["said_to_fit"] and row["fits"]]
    lines.append(f"{len(false)} false 'fits' and {len(missed)} false refusals of {len(judged)} cells")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, to check the script without a GPU")
    parser.add_argument("--budget", type=float, help="seconds after which no further cell begins")
    parser.add_argument("--models", nargs="*", help=f"of {', '.join(kinds(small=False))}")
    parser.add_argument("--rates", type=Path, help="a file of rates, instead of measuring them")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    given = parser.parse_args()
    known = kinds(given.small)
    if unknown := [name for name in given.models or () if name not in known]:
        parser.error(f"--models: expected some of {list(known)}, got {unknown}")
    if DEVICE != "cuda" and not given.small:
        parser.error("needs a GPU; --small checks the script without one")
    run = Run(given)
    print(f"rates after {time.perf_counter() - run.begin:.0f} s: {run.rates}")
    for name, kind in known.items():
        if not given.models or name in given.models:
            run.model(name, kind)
    print(f"\n{summary(run.rows)}\n{run.path}, {time.perf_counter() - run.begin:.0f} s")


if __name__ == "__main__":
    main()
