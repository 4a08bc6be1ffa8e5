"""What the check of a product costs beside the product, and what it catches.

    python benchmarks/cloud/check.py [--rounds 20] [--trials 4000] [--right 1000000] [--folder amd-epyc-2-cores]

Rows: milliseconds of product and check in turns, the medians and the shortest; the share of wrong tokens that is
caught, by error; and right tokens that are called wrong, or need a second look, of products of several kinds. Every
hundred or so wrong tokens and every 5000 right ones the check draws its numbers anew. Times are a record of their own,
as they alone depend on what else the machine does: `--trials 0 --right 0` measures these again, `--rounds 0` the others.
Leaves with 1 where a right token is called wrong.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from apt_model.cloud.freivalds import INT8_REPEATS, Freivalds  # noqa: E402
from apt_model.cloud.int8g64 import GROUP, pack, unpack  # noqa: E402

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"fp32": 23, "bf16": 7, "fp16": 10}  # of a fraction
SHAPES = [(4096, 1), (4096, 16), (4096, 512), (16, 1), (16, 128)]
KINDS = ("normal", "positive", "outliers", "heavy", "tiny", "huge", "zero rows", "cancelling", "uneven")
BATCH = 125


def made(weight, bias, wire):
    """The check that a layer has for this wire."""
    if wire == "int8g64":
        return Freivalds(weight, bias, fold=GROUP, repeats=INT8_REPEATS)
    return Freivalds(weight, bias)


def read(values, wire):
    return unpack(*pack(values), values.shape[-1], values.dtype) if wire == "int8g64" else values


def problem(dtype, tokens, width, out, kind="normal"):
    """x, weight and bias."""
    x, weight, bias = torch.randn(tokens, width), torch.randn(out, width) / width**0.5, torch.randn(out)
    if kind == "positive":
        x, weight = x.abs(), weight.abs()
    elif kind == "outliers":
        x[:, :3] *= 100
        weight[:, 3] *= 30
    elif kind == "heavy":
        x, weight = x / torch.rand_like(x).clamp_min(1e-3), weight / torch.rand_like(weight).clamp_min(1e-2)
    elif kind == "tiny":
        x, bias = x * {torch.float16: 1e-6, torch.bfloat16: 1e-30, torch.float32: 1e-30}[dtype], bias * 0
    elif kind == "huge":
        x, bias = x * {torch.float16: 1e4, torch.bfloat16: 1e37, torch.float32: 1e37}[dtype], bias * 0
    elif kind == "zero rows":
        x[::2], weight[::3], bias[::2] = 0, 0, 0
    elif kind == "cancelling":
        x += 10
        weight -= weight.mean(1, keepdim=True)
    elif kind == "uneven":
        weight *= torch.exp(2 * torch.randn(out, 1))
        bias *= 10
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def times(name, wire, width, tokens, rounds):
    torch.manual_seed(0)
    x, weight, bias = problem(TYPES[name], tokens, width, width)
    x, check = read(x, wire), made(weight, bias, wire)
    y = read(F.linear(x, weight, bias), wire)
    arms = (lambda: F.linear(x, weight, bias), lambda: check.check(x, y, "here", int8=wire == "int8g64"))
    took = [[], []]
    for number in range(rounds + 2):
        for arm, each in zip(arms, took, strict=True):
            began = time.perf_counter()
            arm()
            if number > 1:
                each.append((time.perf_counter() - began) * 1e3)
    median, least = ([measure(each) for each in took] for measure in (statistics.median, min))
    return {
        "what": "time", "type": name, "wire": wire, "width": width, "tokens": tokens,
        "product_ms": round(median[0], 4), "check_ms": round(median[1], 4), "share": round(median[1] / median[0], 3),
        "least_product_ms": round(least[0], 4), "least_check_ms": round(least[1], 4),
        "least_share": round(least[1] / least[0], 3),
    }  # fmt: skip


def flipped(values, bit):
    """One element of each row with one bit changed."""
    changed = values.clone()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    columns = torch.randint(0, values.shape[1], (len(values),))
    changed.view(integers)[torch.arange(len(values)), columns] ^= 1 << bit
    return changed


class Case(NamedTuple):
    """A right product, and what it was computed from."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    y: torch.Tensor

    def product(self, **other):
        """With something else in place of what it was computed from."""
        it = self._replace(**other)
        return F.linear(it.x, it.weight, it.bias)


def errors(name, wire):
    """Name: from a case to a wrong y."""
    bits = BITS[name]
    found = {f"bit {bit} of y": lambda it, bit=bit: flipped(it.y, bit) for bit in range(bits)}
    found |= {
        f"bit {bit} of x": lambda it, bit=bit: it.product(x=flipped(it.x, bit))
        for bit in sorted({bits + 1, bits, *range(bits - 1, 0, -3)})
    }
    found |= {
        f"bit {bit} of the weight": lambda it, bit=bit: it.product(weight=flipped(it.weight, bit))
        for bit in (bits + 1, bits, bits - 1, bits - 2)
    }
    for size in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4, 1e-5, 3e-6):
        found[f"row scaled by {size:g}"] = lambda it, size=size: (it.y.float() * (1 + size)).to(it.y.dtype)
        for count in (1, 2, 8, 64, None):
            found[f"{count or 'all'} elements off by {size:g}"] = lambda it, n=count, size=size: added(it.y, n, size)
    found |= {
        "64 elements zero": lambda it: run(it.y, torch.zeros_like(it.y)),
        "64 elements of another token": lambda it: run(it.y, it.y.roll(1, 0)),
        "64 elements without bias": lambda it: run(it.y, it.product(bias=None)),
        "every other element doubled": lambda it: it.y * (1 + torch.arange(it.y.shape[1]) % 2),
        "another token": lambda it: it.y.roll(1, 0),
        "weights 1.001 times": lambda it: it.product(weight=it.weight * 1.001),
        "no bias": lambda it: it.product(bias=None),
        "all zero": lambda it: torch.zeros_like(it.y),
    }
    if wire == "int8g64":
        found = {f"bit {bit} of a scale": lambda it, bit=bit: scaled(it.y, bit) for bit in range(4, 15)} | found
    return found


def run(y, other):
    changed = y.clone()
    at = int(torch.randint(0, y.shape[1] - GROUP, ()))
    changed[:, at : at + GROUP] = other[:, at : at + GROUP]
    return changed


def added(y, count, size):
    """A run of elements off by random numbers, of `size` times the token's length in all."""
    error = torch.randn_like(y, dtype=torch.float32)
    if count:
        starts = torch.randint(0, y.shape[1] - count, (len(y), 1))
        places = torch.arange(y.shape[1])
        error *= (places >= starts) & (places < starts + count)
    error *= size * y.float().norm(dim=1, keepdim=True) / error.norm(dim=1, keepdim=True)
    return (y.float() + error).to(y.dtype)


def scaled(y, bit):
    q, scale = pack(y)
    return unpack(q, flipped(scale, bit), y.shape[1], y.dtype)


def caught(name, wire, width, out, trials):
    torch.manual_seed(1)
    changes = errors(name, wire)
    got, tried = dict.fromkeys(changes, 0), dict.fromkeys(changes, 0)
    for _ in range(max(trials // BATCH, 1)):
        x, weight, bias = problem(TYPES[name], BATCH, width, out)
        x, check = read(x, wire), made(weight, bias, wire)
        case = Case(x, weight, bias, F.linear(x, weight, bias))
        for error, change in changes.items():
            wrong = change(case) if error.endswith("of a scale") else read(change(case), wire)
            got[error] += int(check.wrong(x, wrong, int8=wire == "int8g64").sum())
            tried[error] += BATCH
    return {
        "what": "caught", "type": name, "wire": wire, "width": width, "out": out, "trials": max(tried.values()),
        "caught": {error: round(got[error] / tried[error], 5) for error in changes},
    }  # fmt: skip


def alarms(name, wire, tokens):
    """Right tokens of each kind that are called wrong, and that are suspect."""
    torch.manual_seed(2)
    rows = []
    for kind in KINDS:
        if wire == "int8g64" and kind in ("tiny", "huge", "heavy"):
            continue  # no scale in fp16 holds these
        done = wrong = suspect = 0
        while done < tokens / len(KINDS):
            x, weight, bias = problem(
                TYPES[name], 5000, (48, 256)[done // 5000 % 2], (640, 1000)[done // 5000 % 2], kind
            )
            x, check = read(x, wire), made(weight, bias, wire)
            y = read(F.linear(x, weight, bias), wire)
            fits = y.isfinite().all(1)  # else the type holds no such product
            x, y = x[fits], y[fits]
            wrong += int(check.wrong(x, y, int8=wire == "int8g64").sum())
            suspect += int(check._suspicion.of(x, y).sum()) if hasattr(check, "_suspicion") else 0
            done += 5000
        rows.append({"what": "right", "type": name, "wire": wire, "kind": kind, "tokens": done, "called_wrong": wrong,
                     "suspect": suspect if wire == "exact" else done})  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=4000, help="wrong tokens of each error")
    parser.add_argument("--right", type=int, default=1_000_000, help="right tokens of each type")
    parser.add_argument(
        "--folder", help="of benchmarks/results, to write cloud_check_time.json and cloud_check.json there"
    )
    options = parser.parse_args()
    above, rows = record.header(), []

    def keep(*found):
        rows.extend(found)
        for row in found:
            print(json.dumps(row), flush=True)

    for name in TYPES:
        for wire in ("exact", "int8g64"):
            for width, tokens in SHAPES if options.rounds else ():
                rounds = options.rounds * (1 if tokens == 512 else 5 if width == 4096 else 100)
                keep(times(name, wire, width, tokens, rounds))
    for name in TYPES:
        for wire in ("exact", "int8g64"):
            if options.trials:
                keep(caught(name, wire, 256, 640, options.trials), caught(name, wire, 1024, 1024, options.trials // 4))
            if options.right:
                keep(*alarms(name, wire, options.right))
    if options.folder:
        above["machine"]["device"] = record.processor()
        above["command"] = " ".join(["python", "benchmarks/cloud/check.py", *sys.argv[1:]])
        folder = ROOT / "benchmarks" / "results" / options.folder
        for file, is_time in (("cloud_check_time", True), ("cloud_check", False)):
            found = [row for row in rows if (row["what"] == "time") == is_time]
            if found:
                print(record.write(file, found, folder=folder, above=above))
    return int(any(row.get("called_wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
