"""The rates of this machine (`rates.py`), measured in a second or two and in as much memory as is given for it."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from apt_model.core.system.device import Device
from apt_model.core.system.timing import Stopwatch
from apt_model.ops import fp4
from apt_model.vgpu.memory import Memory
from apt_model.vgpu.modules import tree_of
from apt_model.vgpu.rates import FP4, Curve, Rates
from apt_model.vgpu.units import MB, PAGE
from apt_model.vgpu.work import Facts, chain_bytes, work_of

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Rows of x, and the side of a weight: of a large product, which a model's own come near to.
_ROWS_GPU, _ROWS_CPU = (1, 16, 64, 256, 1024, 4096, 16384), (1, 16, 64, 256, 1024)
_SIDE_GPU, _SIDE_CPU, _SIDE_LEAST = 4096, 512, 64
_NARROWER = 4
# Bytes of weights that take turns, so that no cache holds the next one.
_TURNS_GPU, _TURNS_CPU = 256 * MB, 64 * MB
# Of what is copied, to learn a rate; and how long each figure is measured: until a device is at its lasting speed.
_PROBE, _SECONDS_GPU, _SECONDS_CPU = 64 * MB, 0.15, 0.06
_HEADS, _HEAD_WIDTH, _LENGTH_GPU, _LENGTH_CPU = 16, 128, 4096, 256
_TINY_WIDTH, _TINY_HEADS = 64, 4
_CHAIN_WIDTH_GPU, _CHAIN_WIDTH_CPU, _CHAIN_COPIES = 4096, 512, 8


@dataclasses.dataclass(frozen=True)
class Probe:
    """Measures on one device.

    Args:
        device: where.
        room: bytes of its memory that may be used at once.
        seconds: how long each figure is measured.
    """

    device: Device
    room: int
    seconds: float = _SECONDS_CPU

    @property
    def real(self) -> bool:
        """Whether it is an accelerator."""
        return self.device.kind != "cpu"

    def time(self, work: Callable[[], object]) -> float:
        """Seconds of one call among many, until the device has done them."""
        return Stopwatch(self.device, self.seconds).wall(work)

    def products(self, dtype: torch.dtype, *, narrow: bool = False) -> Curve:
        """Of linear layers in `dtype`, by rows of x."""
        element, most = torch.empty(0, dtype=dtype).element_size(), _TURNS_GPU if self.real else _TURNS_CPU
        side = self.side(element, narrow=narrow)
        count = max(1, min(most, self.room // 2) // (side * side * element))
        weights = [torch.randn(side, side, device=self.device.device).to(dtype) for _ in range(count)]
        return self._curve(weights, side, dtype, functional.linear, narrow=narrow)

    def fp4_products(self, dtype: torch.dtype, *, narrow: bool = False) -> Curve:
        """Of linear layers with nvfp4 weights, in the order in which they compute."""
        side = self.side(2, narrow=narrow)
        made = fp4.quantize(torch.randn(side, side, device=self.device.device) * 0.02, "nvfp4")
        weight: fp4.Operand = made
        if fp4.wants_order(fp4.NVFP4, self.device.device, dtype):
            weight = fp4.shuffle_if_reversible(made, dtype) or made
        return self._curve([weight], side, dtype, lambda x, each: fp4.linear(x, each, None), narrow=narrow)

    def side(self, element: int, *, narrow: bool = False) -> int:
        """Of a weight, of which `element` bytes are an element."""
        side = (_SIDE_GPU if self.real else _SIDE_CPU) // (_NARROWER if narrow else 1)
        return max(_SIDE_LEAST, min(side, int((self.room / 8 / element) ** 0.5) // _SIDE_LEAST * _SIDE_LEAST))

    def _curve(
        self, weights: Sequence[object], side: int, dtype: torch.dtype, linear: Callable[..., Tensor], *, narrow: bool
    ) -> Curve:  # fmt: skip
        found = []
        for rows in (_ROWS_GPU if self.real else _ROWS_CPU)[:: 2 if narrow else 1]:
            if rows > 1 and 2 * rows * side * dtype.itemsize > self.room // 3:
                break
            x = torch.randn(rows, side, device=self.device.device).to(dtype)

            taken = self.time(functools.partial(_next_product, linear, x, itertools.cycle(weights)))
            found.append((rows, 2 * rows * side * side / taken / 1e12))
        return tuple(found)

    def attention(self, dtype: torch.dtype) -> float:
        """Of scaled dot product attention, not causal: TFLOP/s."""
        length = _LENGTH_GPU if self.real else _LENGTH_CPU
        while length > 16 and 4 * _HEADS * length * _HEAD_WIDTH * dtype.itemsize > self.room // 2:
            length //= 2
        shape = (1, _HEADS, length, _HEAD_WIDTH)
        q, k, v = (torch.randn(*shape, device=self.device.device).to(dtype) for _ in range(3))
        taken = self.time(lambda: functional.scaled_dot_product_attention(q, k, v))
        return 4 * length * length * _HEADS * _HEAD_WIDTH / taken / 1e12

    def memory(self) -> float:
        """Of level 1's memory, read and written: GB/s."""
        size = max(PAGE, min(4 * _PROBE if self.real else _PROBE, self.room // 3))
        source = torch.zeros(size, dtype=torch.uint8, device=self.device.device)
        target = torch.empty_like(source)
        return 2 * size / self.time(lambda: target.copy_(source)) / 1e9

    def chains(self, dtype: torch.dtype) -> float:
        """Of RMSNorm and rotary embedding as transformers writes them, by the bytes that are counted: GB/s."""
        width = _CHAIN_WIDTH_GPU if self.real else _CHAIN_WIDTH_CPU
        rows = max(1, min(width, self.room // (_CHAIN_COPIES * 4 * width)))
        norm = _Norm(width).to(self.device.device, dtype)
        x = torch.randn(1, rows, width, device=self.device.device).to(dtype)
        heads = x.view(1, rows, -1, _TINY_WIDTH).transpose(1, 2)
        turn = torch.zeros(rows, _TINY_WIDTH, device=self.device.device, dtype=dtype)
        counted = rows * width * chain_bytes(dtype.itemsize)
        return counted / self.time(lambda: (norm(x), _rotated(heads, turn, turn))) / 1e9

    def launch(self, dtype: torch.dtype) -> float:
        """Seconds of the host for a kernel, Python around it included: of a tiny block, counted as others are."""
        block = _Tiny().to(self.device.device, dtype)
        x = torch.zeros(1, 1, _TINY_WIDTH, device=self.device.device, dtype=dtype)
        turn = torch.zeros(_TINY_WIDTH // _TINY_HEADS, device=self.device.device, dtype=dtype)
        launches = work_of(tree_of(block), Facts(width=_TINY_WIDTH, rotary=True), dtype.itemsize).launches
        return self.time(lambda: block(x, turn, turn)) / launches


def _next_product(linear: Callable[..., Tensor], x: Tensor, weights: Iterator[object]) -> Tensor:
    return linear(x, next(weights))


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class _Tiny(nn.Module):
    """A block as transformers writes them, so small that its time is the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = _Norm(_TINY_WIDTH), _Norm(_TINY_WIDTH)
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        self.linear = nn.ModuleDict({name: nn.Linear(_TINY_WIDTH, _TINY_WIDTH, bias=False) for name in names})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (1, 1, _TINY_HEADS, _TINY_WIDTH // _TINY_HEADS)
        normed = self.input_layernorm(x)
        q, k, v = (self.linear[f"{name}_proj"](normed).view(shape).transpose(1, 2) for name in "qkv")
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.linear["o_proj"](attended)
        normed = self.post_attention_layernorm(x)
        gated = functional.silu(self.linear["gate_proj"](normed)) * self.linear["up_proj"](normed)
        return x + self.linear["down_proj"](gated)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rates_of(
    device: Device, dtypes: Sequence[str], *, fp4: bool = True, room: int | None = None, seconds: float | None = None
) -> Rates:
    """Everything of a device but link and disk, which are between levels.

    Args:
        device: where models compute.
        dtypes: of linear layers, by safetensors' names.
        fp4: whether 4-bit weights are of interest.
        room: bytes of its memory that may be used; None: a quarter of what is free, up to 1 GB.
        seconds: how long each figure is measured; None: until a device is at its lasting speed.
    """
    usual = _SECONDS_CPU if device.kind == "cpu" else _SECONDS_GPU
    probe = Probe(device, min(device.free_memory() // 4, 1000 * MB) if room is None else room, seconds or usual)
    known = [DTYPES[name] for name in dtypes if name in DTYPES] or [torch.float32]
    with torch.inference_mode():
        found = Rates(
            device=f"{device.name()}, torch {torch.__version__}",
            kind="gpu" if probe.real else "cpu",
            memory_gbps=probe.memory(),
            chain_gbps=probe.chains(known[0]),
            products={name: probe.products(DTYPES[name]) for name in dtypes if name in DTYPES},
            fp4_products=probe.fp4_products(known[0]) if fp4 else (),
            attention_tflops=probe.attention(known[0]),
            launch_s=probe.launch(known[0]),
        )
        element = known[0].itemsize
        low, high = (probe.side(element, narrow=each) ** 2 for each in (True, False))
        if low == high:  # there is no room for two
            return found
        narrow = {name: probe.products(DTYPES[name], narrow=True) for name in found.products}
        narrow |= {FP4: probe.fp4_products(known[0], narrow=True)} if fp4 else {}
        return dataclasses.replace(found, narrow_products=narrow, numels=(low, high))


def link_gbps(memory: Memory, device: Device) -> float | None:
    """From the arena to level 1, as far as both have room for a moment; None where they have none."""
    host, first = memory.host, memory.first
    assert host is not None
    size = min(_PROBE, first.free, host.free) // PAGE * PAGE
    if not size:
        return None
    what = "a copy to learn the link's rate"
    first.take(size, what)
    try:
        region = memory.take_host(size, what)
        try:
            target = torch.empty(size, dtype=torch.uint8, device=memory.lanes.device)
            copy = functools.partial(target.copy_, region.tensor, non_blocking=True)
            return size / Probe(device, 0).time(copy) / 1e9
        finally:
            memory.give_host(region)
    finally:
        first.give(size)


def disk_gbps(memory: Memory) -> float | None:
    """Of blobs that are written for this and removed, as far as there is room; two are read at once."""
    assert memory.store is not None
    assert memory.disk is not None
    size = min(_PROBE, memory.disk.free // 2) // PAGE * PAGE
    if not size:
        return None
    store, data = memory.store, [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    names = [f"how fast the disk is {i}" for i in range(2)]
    memory.disk.take(2 * size, "blobs to learn the disk's rate")
    try:
        for name, each in zip(names, data, strict=True):
            store.write(name, each)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            for handle in [store.read_async(name, each) for name, each in zip(names, data, strict=True)]:
                handle.wait()
            times.append(time.perf_counter() - begin)
        return 2 * size / statistics.median(times) / 1e9
    finally:
        for name in names:
            if name in store:
                store.delete(name)
        memory.disk.give(2 * size)
