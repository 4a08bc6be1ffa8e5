"""A layer or a block computes on a GPU server, for a client that has a CPU alone: what is gained, and from where on.

    python benchmarks/cloud/gpu_block.py [--small] [--device cuda] [--folder nvidia-h200]

Client and server (`apt-model serve --device cuda`) share a machine; torch has the threads it takes by itself. Subjects
are `CloudNPULinear` and `RemoteBlock`s of 1, 4 and 8 Llama layers. Arms, in turns, a call of each after the other:

    local           on this CPU, which is the fallback
    remote          over the loopback; of a linear without the check of its product
    verified        a linear, every token checked
    four_bits       one layer whose weights the server keeps in nvfp4
    streamed        eight layers on a server whose GPU has room for two (--gpu-mb, --ram-mb)
    device          the device in this process, inputs and weights there: the bound; by CUDA's events
    there_and_back  the same from the CPU's memory and back to it

Every answer is compared with the local one. Milliseconds. What a network would do is not measured but computed from the
medians and bytes above it: the bits a second at which it would still be as fast as here, given a round trip.
"""

import argparse
import contextlib
import copy
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cloud"), str(ROOT / "benchmarks")]

import record  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers as tf  # noqa: E402
from served import running  # noqa: E402

from apt_model.cli.serving import hf_block  # noqa: E402
from apt_model.cloud.backend import OIPBackend  # noqa: E402
from apt_model.cloud.http_transport import HttpTransport  # noqa: E402
from apt_model.cloud.remote_block import RemoteBlock  # noqa: E402
from apt_model.cloud.server.blocks import make_block, register  # noqa: E402
from apt_model.optimization import CloudNPULinear  # noqa: E402

SECONDS = 300.0  # of a forward; kernels may have to be compiled first
LONG = 2.0  # seconds of a local call that is not repeated
ROUND_TRIPS = (0.3, 5.0, 30.0)
# Norm of the difference beside the norm; a residual stream hides most of what 4 bits do.
NEAR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
FOUR_BITS = 0.3
REMOTE = ("remote", "verified", "four_bits", "streamed")


class Sizes:
    """Of the whole run, or of a look at it."""

    def __init__(self, *, small):
        self.seconds = 0.05 if small else 0.5  # of an arm in a row
        self.most_calls = 3 if small else 15
        self.tokens = (1, 16, 128) if small else (1, 16, 128, 1024)
        self.width, inner = (256, 896) if small else (4096, 14336)
        self.outputs = (self.width, inner)
        self.layers = (1, 4, 8)
        heads, groups = (4, 1) if small else (32, 8)
        self.config = tf.LlamaConfig(
            hidden_size=self.width, intermediate_size=inner, num_hidden_layers=self.layers[-1], vocab_size=64,
            num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096,
        )  # fmt: skip


class Arm:
    """A call, whose answer is where the client has its tensors, and the layer whose bytes it costs."""

    def __init__(self, call, *, layer=None, near=None, on_device=False):
        self.call, self.layer, self.near, self.on_device = call, layer, near, on_device
        self.took, self.off, self.bytes = [], 0.0, None

    def time(self, device):
        """Seconds of one call, and its answer."""
        if self.on_device and device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            found = self.call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3, found
        began = time.perf_counter()
        found = self.call()
        return time.perf_counter() - began, found

    def moved(self):
        """Bytes up and down so far."""
        stats = self.layer.get_stats()
        return stats["bytes_sent"], stats["bytes_received"]


def measure(arms, sizes, device):
    """Call the arms in turns, each as often as its time allows; "local" comes first, and is the expected answer."""
    expected, left = None, {}
    for name, arm in arms.items():
        seconds, found = arm.time(device)
        expected = found if name == "local" else expected
        _compare(name, arm, found, expected)
        if name == "local" and seconds > LONG:
            arm.took.append(seconds)
            left[name] = 0
            continue
        # The first may have compiled or placed something, and says little.
        seconds, found = arm.time(device)
        _compare(name, arm, found, expected)
        left[name] = max(3, min(sizes.most_calls, int(sizes.seconds / max(seconds, 1e-9))))
    before = {name: arm.moved() for name, arm in arms.items() if arm.layer is not None}
    calls = dict(left)
    while any(left.values()):
        for name, arm in arms.items():
            if left[name]:
                left[name] -= 1
                seconds, found = arm.time(device)
                arm.took.append(seconds)
                _compare(name, arm, found, expected)
    for name, then in before.items():
        arm = arms[name]
        if calls[name]:
            arm.bytes = [(now - old) // calls[name] for now, old in zip(arm.moved(), then, strict=True)]


def _compare(name, arm, found, expected):
    found, expected = found.detach().float().cpu(), expected.float()
    off = float((found - expected).norm() / expected.norm())
    arm.off = max(arm.off, off)
    near = arm.near or NEAR[torch.float32]
    assert off <= near, f"{name}: {off:.3g} off, expected at most {near}"


def row(subject, tokens, arms):
    """A line of the table."""
    middle = {name: 1e3 * statistics.median(arm.took) for name, arm in arms.items()}
    found = {"what": subject, "tokens": tokens}
    for name, arm in arms.items():
        found[name] = {
            "median": round(middle[name], 4), "p10": _part(arm.took, 0.1), "p90": _part(arm.took, 0.9),
            "calls": len(arm.took),
        }  # fmt: skip
        if name != "local":
            found[name]["furthest_off"] = float(f"{arm.off:.2g}")
        if arm.bytes is not None:
            found[name]["bytes_up"], found[name]["bytes_down"] = arm.bytes
    there = [name for name in REMOTE if name in arms]
    found["to_local"] = {name: round(middle[name] / middle["local"], 4) for name in [*there, "device"]}
    found["computed_break_even_mbit_s"] = {
        name: {f"rtt_{trip}_ms": _break_even(middle["local"] - middle[name] - trip, arms[name].bytes)
               for trip in ROUND_TRIPS}
        for name in there if arms[name].bytes is not None
    }  # fmt: skip
    return found


def _break_even(milliseconds, moved):
    """Mbit/s at which these bytes take what is left of the local time; None: no bandwidth is enough."""
    return round(8 * sum(moved) / milliseconds / 1e3, 2) if milliseconds > 0 else None


def _part(took, part):
    ordered = sorted(took)
    return round(1e3 * ordered[round(part * (len(ordered) - 1))], 4)


def wins(subject, rows, **more):
    """From how many tokens on each arm elsewhere is faster than here; None: not at the most that was tried."""
    found = {}
    for name in (each for each in REMOTE if each in rows[0]["to_local"]):
        found[name] = None
        for each in reversed(rows):
            if each["to_local"][name] >= 1:
                break
            found[name] = each["tokens"]
    return {"what": subject, "elsewhere_wins_from_tokens": found, **more}


def backend_of(port):
    return contextlib.closing(OIPBackend([HttpTransport(f"http://127.0.0.1:{port}")]))


def pushed(layer):
    """Give the server the weights: how long that takes, all of it, and their bytes."""
    began = time.perf_counter()
    count = layer.push_weights()
    return {"pushed_mb": round(count / 1e6, 1), "push_seconds": round(time.perf_counter() - began, 2)}


def linears(sizes, backend, device, say):
    """`CloudNPULinear` of two shapes in two types."""
    for out in sizes.outputs:
        for dtype in (torch.bfloat16, torch.float32):
            _linear(sizes, out, dtype, backend, device, say)


def _linear(sizes, out, dtype, backend, device, say):
    subject = f"linear {sizes.width}x{out} {str(dtype).removeprefix('torch.')}"
    made = torch.nn.Linear(sizes.width, out, dtype=dtype, device=device).requires_grad_(requires_grad=False)
    there = {name: each.detach() for name, each in made.named_parameters()}
    linear = copy.deepcopy(made).cpu()
    here = dict(linear.named_parameters())
    options = {"cloud_backend": backend, "fallback_local": False, "deadline_s": SECONDS}
    plain = CloudNPULinear.from_linear(linear, verify=False, **options)
    checked = CloudNPULinear.from_linear(linear, **options)
    about, rows = pushed(plain), []
    # The server has the weights by now: what takes time is to digest them, and to fold them for the check.
    about["check_made_in_seconds"] = pushed(checked)["push_seconds"]
    for tokens in sizes.tokens:
        x = torch.randn(tokens, sizes.width).to(dtype)
        on = x.to(device)
        arms = {
            "local": Arm(lambda x=x: F.linear(x, *here.values())),
            "remote": Arm(lambda x=x: plain(x), layer=plain),
            "verified": Arm(lambda x=x: checked(x), layer=checked),
            "device": Arm(lambda x=on: F.linear(x, *there.values()), on_device=True),
            "there_and_back": Arm(lambda x=x: F.linear(x.to(device), *there.values()).cpu()),
        }
        for arm in arms.values():
            arm.near = NEAR[dtype]
        measure(arms, sizes, device)
        rows.append(row(subject, tokens, arms))
        say(rows[-1])
    say(wins(subject, rows, **about))


def layers_of(sizes, device):
    """Tensors of all layers on the device: numbers of one, copied for the others, as time does not depend on them."""
    register(hf_block.KIND)
    with torch.device("meta"):
        model = tf.LlamaModel(sizes.config)
    torch.manual_seed(0)
    first = {}
    for name, each in model.layers[0].state_dict().items():
        drawn = torch.randn(each.shape, device=device, dtype=torch.bfloat16)
        first[name] = drawn.mul_(0.02) if each.ndim > 1 else drawn.fill_(1)
    count = sizes.layers[-1]
    return {f"{number}.{name}": each.clone() for number in range(count) for name, each in first.items()}


class Blocks:
    """The first layers of the model, on the servers and here."""

    def __init__(self, sizes, device):
        self.sizes, self.device = sizes, device
        self.there = layers_of(sizes, device)
        self.here = {name: each.cpu() for name, each in self.there.items()}

    def about(self, count, **more):
        """Kind and configuration of the first `count`, and which tensors are theirs."""
        config = {"model": json.loads(self.sizes.config.to_json_string()), "layers": [0, count - 1], **more}
        return "hf_block", config, [name for name in self.here if int(name.partition(".")[0]) < count]

    def remote(self, count, backend, **more):
        kind, config, names = self.about(count, **more)
        tensors = {name: self.here[name] for name in names}
        return RemoteBlock(kind, config, tensors, cloud_backend=backend, fallback_local=False, deadline_s=SECONDS)

    def module(self, count, tensors, device):
        kind, config, names = self.about(count)
        return make_block(kind, config, {name: tensors[name] for name in names}).module.to(device)

    def rows(self, count, elsewhere, say, about):
        """All numbers of tokens; `elsewhere` are blocks by the name of their arm."""
        subject = f"{count} llama layers of width {self.sizes.width} bfloat16"
        here, there = self.module(count, self.here, "cpu"), self.module(count, self.there, self.device)
        rows = []
        for tokens in self.sizes.tokens:
            x = torch.randn(1, tokens, self.sizes.width).bfloat16()
            on = x.to(self.device)
            arms = {"local": Arm(lambda x=x: here(x))}
            for name, block in elsewhere.items():
                near = FOUR_BITS if name == "four_bits" else None
                arms[name] = Arm(lambda x=x, block=block: block(x), layer=block, near=near)
            arms["device"] = Arm(lambda x=on: there(x), on_device=True)
            arms["there_and_back"] = Arm(lambda x=x: there(x.to(self.device)).cpu())
            for arm in arms.values():
                arm.near = arm.near or NEAR[torch.bfloat16]
            measure(arms, self.sizes, self.device)
            rows.append(row(subject, tokens, arms))
            say(rows[-1])
        say(wins(subject, rows, **about))


def streaming(store, block, sizes, device):
    """A server of the same file, with room on the GPU for two layers of the most."""
    version = block.weights.version
    path = store / block.weights.model / f"{version}.safetensors"
    whole = block.weights.nbytes / 1e6
    room = 2.1 * whole / sizes.layers[-1]
    options = ("--weights", path, "--name", block.weights.model, "--gpu-mb", room, "--ram-mb", 1.2 * whole + 50)
    return running(*options, "--max-body", "256MiB", device=str(device)), {"gpu_mb": round(room, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the server")
    parser.add_argument("--small", action="store_true", help="narrow layers and few calls, to see that it runs")
    parser.add_argument("--folder", help="of benchmarks/results, to write cloud_gpu_block.json there")
    parser.add_argument("--out", type=Path, help="another folder for it")
    options = parser.parse_args()
    logging.getLogger("apt_model.cloud").setLevel(logging.ERROR)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    began, above, rows = time.perf_counter(), record.header(), []
    sizes, device = Sizes(small=options.small), torch.device(options.device)

    def say(found):
        rows.append({**found, "at_second": round(time.perf_counter() - began, 1)})
        print(json.dumps(rows[-1]), flush=True)

    with contextlib.ExitStack() as held:
        store = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="apt-gpu-block-")))
        limits = ("--max-body", "256MiB", "--max-store", "32GiB", "--allow-upload", "--store", store)
        _, port = held.enter_context(running(*limits, device=options.device, log=sys.stderr))
        backend = held.enter_context(backend_of(port))
        linears(sizes, backend, device, say)
        blocks = Blocks(sizes, device)
        for count in sizes.layers:
            elsewhere = {"remote": blocks.remote(count, backend)}
            about = pushed(elsewhere["remote"])
            with contextlib.ExitStack() as more:
                if count == sizes.layers[0]:
                    elsewhere["four_bits"] = blocks.remote(count, backend, quantize="nvfp4")
                    about["four_bits"] = pushed(elsewhere["four_bits"])
                if count == sizes.layers[-1]:
                    server, about["streamed"] = streaming(store, elsewhere["remote"], sizes, device)
                    started = time.perf_counter()
                    _, other = more.enter_context(server)
                    about["streamed"]["start_seconds"] = round(time.perf_counter() - started, 2)
                    elsewhere["streamed"] = blocks.remote(count, more.enter_context(backend_of(other)))
                    assert elsewhere["streamed"].push_weights() == 0  # it has them from the file
                blocks.rows(count, elsewhere, say, about)
    folder = options.out or (ROOT / "benchmarks" / "results" / options.folder if options.folder else None)
    if folder:
        above["machine"]["host"] = record.processor()
        above["machine"]["threads"] = torch.get_num_threads()
        above["command"] = " ".join(["python", "benchmarks/cloud/gpu_block.py", *sys.argv[1:]])
        above["unit"] = "ms; client and server on one machine. What begins with computed is not measured"
        print(record.write("cloud_gpu_block", rows, folder=folder, above=above))


if __name__ == "__main__":
    main()
