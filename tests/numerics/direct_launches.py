"""Launch every kernel twice, with no GPU: by Triton's launcher and directly, both into stand-ins for the driver.

`python tests/numerics/direct_launches.py`, without TRITON_INTERPRET: kernels are compiled for sm_90 as a launch would,
and what Triton's own Python passes down to its C, 3.6's and 3.9's, is compared with what the direct launch passes to
the driver: config, attributes, and every parameter. Prints a line a case.
"""

import itertools
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from fake_cuda import FakeCuda, Seen, triton_map
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from apt_model.core.system import cuda
from apt_model.ops import fp4
from apt_model.ops.fp4 import compiled, direct, launch, plan, slab
from apt_model.ops.fp4.layout import shuffle
from apt_model.ops.fp4.tables import Decode, Tile

STREAM = 0xA1B2C3D4E5
SIZES = {"i32": 4, "i64": 8}


class Utils:
    """What Triton's driver is in C: kernels get handles, launches are kept as the list that would be the parameters."""

    def __init__(self):
        self.handles, self.launched = itertools.count(0x7000), []

    def load_binary(self, *_):
        handle = next(self.handles)
        return handle, handle, 64, 0, 1024

    def unload_module(self, _):
        pass

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}

    def build_signature_metadata(self, kinds):
        return list(kinds)

    fill_tma_descriptor = fill_tma_descriptor_tiled = staticmethod(triton_map)

    def launch(self, *said):
        """3.9's C function, whose last two arguments are the kinds of the parameters and the arguments."""
        x, y, z, stream, function, cooperative, early, packed, _, _, _, *scratch, annotations, kinds, arguments = said
        kept = [value for value, how in zip(arguments, annotations, strict=True) if how != "constexpr"]
        self._keep((x, y, z), stream, function, cooperative, early, packed, scratch, kinds, kept)

    def launch_36(self, signature, *said):
        """3.6's, of which each signature has its own."""
        x, y, z, stream, function, cooperative, early, *scratch, packed, _, _, _ = said[:13]
        pairs = [
            (kind, value) for kind, value in zip(signature, said[13:], strict=True) if kind != "constexpr"
        ]  # fmt: skip
        kinds, kept = zip(*pairs, strict=True)
        self._keep((x, y, z), stream, function, cooperative, early, packed, scratch, kinds, kept)

    def _keep(self, grid, stream, function, *about):
        cooperative, early, packed, scratch, kinds, values = about
        warps, ctas, shared = packed
        assert (ctas, cooperative) == (1, False)
        assert not any(scratch)
        kinds, values = [*kinds, "*i8", "*i8"], [*values, 0, 0]
        parameters = tuple(_bytes(kind, value) for kind, value in zip(kinds, values, strict=True))
        self.launched.append(
            Seen(function, grid, (32 * warps, 1, 1), shared, stream, ((6, 1),) if early else (), parameters)
        )


def _bytes(kind, value):
    if kind == "nvTmaDesc":
        return value
    if kind.startswith("*"):
        return struct.pack("Q", value if isinstance(value, int) else value.data_ptr())
    return struct.pack({4: "i", 8: "q"}[SIZES[kind]], value)


def stand_in():
    """Make Triton take this machine for one with a Hopper GPU, and CPU tensors for that GPU's."""
    utils = Utils()
    active = SimpleNamespace(
        utils=utils,
        launcher_cls=nvidia.CudaLauncher,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: STREAM,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    triton.runtime.driver.set_active(active)
    if hasattr(nvidia, "make_launcher"):  # 3.6, which compiles its launcher
        nvidia.library_dirs = list
        nvidia.make_launcher = lambda _, signature, metas: (signature, metas)
        nvidia.compile_module_from_src = lambda src, **_: SimpleNamespace(
            launch=lambda *said: utils.launch_36(expanded(*src), *said)
        )
    else:
        nvidia.PyKernelArg = lambda nested_tuple, type: type  # noqa: A006, ARG005 - as it is called
        nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = "constexpr", "kernel", "tuple"
    fake = FakeCuda()
    direct.library = lambda: fake
    cuda.current_stream = lambda _: STREAM
    cuda.current_index = lambda: -1
    plan.take = lambda count, held, _: held[:count]
    launch.facts = lambda _: ((9, 0), 132)
    cuda.CudaDevice.compute_capability = lambda _: (9, 0)
    torch.Tensor.is_cuda = torch.Tensor.is_cpu
    return utils, fake


def expanded(signature, metas):
    """As 3.6 expands descriptors."""
    found, boxes = [], (len(meta["block_size"]) for meta in metas or ())
    for kind in signature.values():
        rank = next(boxes) if kind.startswith("tensordesc") else 0
        found += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank] if rank else [kind]
    return found


def packed(rows, width, form="nvfp4"):
    return fp4.quantize(torch.randn(rows, width) * 0.02, form)


def products():
    """Settings with what they are launched on: rows of x, outputs, inputs, format, type, bias, activation."""
    bf16, fp16 = torch.bfloat16, torch.float16
    yield Decode(2, 8, 2, 4, 4), (1, 256, 2048, "nvfp4", bf16, True, None)
    yield Decode(1, 16, 4, 8, 1), (16, 192, 1024, "nvfp4", fp16, False, "swiglu")
    yield Decode(2, 8, 0, 4, 2), (5, 256, 1000, "nvfp4", bf16, True, "gelu")
    yield Decode(1, 8, 0, 4, 1), (1, 1, 1, "mxfp4", bf16, False, None)
    yield Decode(4, 8, 1, 4, 1, 2), (1, 256, 64, "nvfp4", bf16, False, None)
    yield Tile(1, 64, 4, 3, 2), (64, 128, 1024, "nvfp4", bf16, True, None)
    yield Tile(2, 128, 2, 3, 1), (100, 256, 320, "mxfp4", bf16, False, "silu")
    yield Tile(4, 8, 8, 2, 1), (3, 300, 1000, "nvfp4", bf16, True, "relu")
    yield Tile(1, 16, 4, 3, 1), (17, 64, 64, "nvfp4", fp16, True, None)


def unpackings():
    for form, dtype in itertools.product(("nvfp4", "mxfp4"), (torch.float32, torch.bfloat16)):
        weight = packed(200, 600, form)
        for ready in (weight, shuffle(weight, torch.bfloat16)):
            yield ready, torch.empty(70, 90, dtype=dtype), 64, 256
    yield shuffle(packed(1, 1), torch.float16), torch.empty(1, 1), 0, 0


def cases():
    for setting, (m, rows, width, form, dtype, has_bias, activation) in products():
        order = shuffle(packed(rows, width, form), dtype, gated=activation == "swiglu")
        bias = torch.randn(rows, dtype=dtype) if has_bias else None
        x = torch.randn(m, width).to(dtype)
        yield (
            str(setting),
            lambda x=x, order=order, bias=bias, activation=activation, setting=setting: launch.run(
                x, order, bias, activation, setting
            ),
        )
        if isinstance(setting, Tile) and activation is None:
            upstream = torch.randn(m, rows).to(dtype)
            yield (
                f"{setting} turned",
                lambda x=upstream, order=order, setting=setting: launch.run(x, order, None, None, setting, turned=True),
            )
    for weight, part, row, column in unpackings():
        name = f"{type(weight).__name__} {weight.format.name} to {part.dtype}"
        yield (
            name,
            lambda weight=weight, part=part, row=row, column=column: slab.unpack(weight, part, row=row, column=column),
        )


def main():
    every = list(cases())
    utils, fake = stand_in()
    memory = cuda.empty = Memory()
    for name, call in every:
        memory.forget()
        call()
        memory.rewind()
        expected, before = utils.launched[-1], len(utils.launched)
        fake.sizes[expected.function] = [len(each) for each in expected.parameters]
        call()
        assert len(utils.launched) == before, f"{name}: by Triton: {[each.fault for each in kernels()]}"
        assert fake.seen[-1] == expected, f"{name}\n{fake.seen[-1]}\n{expected}"
        print(f"{name}: {len(expected.parameters)} parameters, {expected.attributes}")
    assert len(fake.seen) == len(utils.launched)
    assert {each.fault for each in kernels()} == {None}
    print(f"the same, with Triton {triton.__version__}")


class Memory:
    """Gives a second call the memory of the first, so that their pointers are the same."""

    def __init__(self):
        self.forget()

    def forget(self):
        self.given, self.reused = [], None

    def rewind(self):
        self.reused = iter(self.given)

    def __call__(self, shape, strides, dtype):
        if self.reused is not None:
            return next(self.reused)
        self.given.append(torch.empty_strided(shape, strides, dtype=dtype))
        return self.given[-1]


def kernels():
    return [each for each in compiled._known.values() if isinstance(each, compiled.Compiled)]


if __name__ == "__main__":
    main()
