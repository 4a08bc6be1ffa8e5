"""Launches without Triton: what is passed, what is checked before, and what is left to Triton's launcher."""

import contextlib
import copy
import logging
import struct
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, map_of

from apt_model.core.system import cuda
from apt_model.core.system.cuda_driver import MAP, Function, KernelLaunch, Parameter, TensorMap
from apt_model.ops import fp4
from apt_model.ops.fp4 import compiled, counters, launch, naive, plan, slab
from apt_model.ops.fp4.layout import shuffle, unshuffle
from apt_model.ops.fp4.tables import Decode

pytest.importorskip("triton", reason="launches are of Triton's kernels")
from triton import knobs

from apt_model.ops.fp4 import direct

HANDLE, STREAM = 0x7777, 0xABCDEF0123
LINES = {
    "Q": ".param .u64 .ptr .global .align 1 k_param_{}", "i": ".param .u32 k_param_{}", "q": ".param .u64 k_param_{}",
    MAP: ".param .align 64 .b8 k_param_{}[128]",
}  # fmt: skip
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [4, 64], "fp4_padded": False}


@pytest.fixture
def driver(monkeypatch):
    """A driver in place of the machine's, for which tensors in memory are a GPU's."""
    fake = FakeCuda()
    compiled._known.clear()
    monkeypatch.setattr(direct, "library", lambda: fake)
    monkeypatch.setattr(cuda, "current_stream", lambda _: STREAM)
    monkeypatch.setattr(cuda, "current_index", lambda: -1)
    monkeypatch.setattr(cuda, "empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "is_cuda", torch.Tensor.is_cpu)
    return fake


def ptx_of(codes):
    lines = ",\n\t".join(LINES[code].format(i) for i, code in enumerate(codes))
    return f".version 8.7\n.target sm_90a\n.visible .entry k(\n\t{lines}\n)\n.reqntid 128\n{{\n}}\n"


def kernel_of(signature, codes, **changes):
    """As Triton gives a compiled kernel."""
    facts = {
        "target": SimpleNamespace(backend="cuda"), "name": "k", "num_warps": 4, "num_ctas": 1, "shared": 4096,
        "launch_cooperative_grid": False, "launch_pdl": True, "global_scratch_size": 0, "profile_scratch_size": 0,
        "tensordesc_meta": [],
    }  # fmt: skip
    meta = SimpleNamespace(**{**facts, **changes})
    src = SimpleNamespace(signature=signature)
    return SimpleNamespace(metadata=meta, src=src, asm={"ptx": ptx_of(codes)}, function=HANDLE)


def plain(**changes):
    signature = {
        "a": "*i32",
        "b": "constexpr",
        "c": "*bf16",
        "n": "i32",
        "one": "constexpr",
        "s": "i64",
        "SIZE": "constexpr",
    }
    return kernel_of(signature, ["Q", "Q", "i", "q", "Q", "Q"], **changes)


def described(**changes):
    signature = {"x": "tensordesc<bf16[4, 64],NVMMASharedLayout()>", "w": "*i32", "n": "i32"}
    return kernel_of(signature, [MAP, "i", "i", "q", "q", "Q", "i", "Q", "Q"], tensordesc_meta=[META], **changes)


# --- what is passed


@pytest.mark.parametrize("early", [False, True])
def test_a_launch_says_its_config_and_its_parameters_in_order(early):
    fake = FakeCuda({HANDLE: [8, 4, 128, 8, 8, 8]})
    values = [
        Parameter("Q"),
        Parameter("i", -3),
        Parameter(MAP),
        Parameter("q", 2**40),
        Parameter("Q"),
        Parameter("Q", 0),
    ]
    made = KernelLaunch(fake, Function(HANDLE, 256, 49152, early), (7, 5, 3), values)
    picture = bytes(range(128))
    for stream, first in ((0, 11), (STREAM, 2**63)):
        assert made(stream, [first, picture, 13]) == 0
        seen = fake.seen[-1]
        assert (seen.function, seen.grid, seen.block, seen.shared) == (HANDLE, (7, 5, 3), (256, 1, 1), 49152)
        assert (seen.stream, seen.attributes) == (stream, ((6, 1),) if early else ())
        assert seen.parameters == (
            struct.pack("Q", first), struct.pack("i", -3), picture, struct.pack("q", 2**40), struct.pack("Q", 13),
            bytes(8),
        )  # fmt: skip


def test_a_wrong_number_of_parameters_is_an_error():
    made = KernelLaunch(FakeCuda(), Function(HANDLE, 128, 0, False), (1, 1, 1), [Parameter("Q"), Parameter("Q")])
    with pytest.raises(struct.error):
        made(0, [1])


def test_a_map_says_what_triton_s_does():
    fake = FakeCuda()
    found = TensorMap(9, 2, (16, 5, 64), (64, 1024, 1), (8, 4, 64), 3).encode(fake, 0x1000)
    assert found == map_of(9, 0x1000, (64, 5, 16), (2048, 128), (64, 4, 8), (1, 1, 1), (0, 3, 2, 0))
    fake.map_result = 1
    assert TensorMap(9, 2, (4, 64), (64, 1), (4, 64), 3).encode(fake, 0x1000) is None


def test_tensors_that_are_not_there_and_numbers_that_are_one_are_not_passed(driver):
    kernel, a, c = plain(), torch.zeros(4), torch.zeros(2)
    assert direct.fault(kernel) is None
    driver.sizes[HANDLE] = [8, 8, 4, 8, 8, 8]
    made = direct.Direct(kernel, -1, (a, None, c), (3, 2, 1), (77, 1, 2**35), ())
    assert made((a, None, c))
    (seen,) = driver.seen
    assert (seen.grid, seen.block, seen.shared, seen.stream) == ((3, 2, 1), (128, 1, 1), 4096, STREAM)
    assert seen.parameters == (
        *(struct.pack("Q", each.data_ptr()) for each in (a, c)), struct.pack("i", 77), struct.pack("q", 2**35),
        bytes(8), bytes(8),
    )  # fmt: skip


def test_a_descriptor_is_a_map_with_shape_and_strides(driver):
    kernel, x, w = described(), torch.zeros(6, 64), torch.zeros(3)
    assert direct.fault(kernel) is None
    driver.sizes[HANDLE] = [128, 4, 4, 8, 8, 8, 4, 8, 8]
    made = direct.Direct(kernel, -1, (x, w), (1, 1, 1), (5,), (((6, 64), (96, 1)),))
    assert made((x, w))
    parameters = driver.seen[-1].parameters
    assert parameters[0] == map_of(9, x.data_ptr(), (64, 6), (192,), (64, 4), (1, 1), (0, 3, 2, 0))
    assert parameters[1:5] == (*(struct.pack("i", each) for each in (6, 64)), *(struct.pack("q", n) for n in (96, 1)))
    assert parameters[5:7] == (struct.pack("Q", w.data_ptr()), struct.pack("i", 5))


def test_maps_are_kept_but_not_without_end(driver, monkeypatch):
    monkeypatch.setattr(direct, "_MOST_MAPS", 3)
    driver.sizes[HANDLE] = [128, 4, 4, 8, 8, 8, 4, 8, 8]
    w, places = torch.zeros(3), [torch.zeros(6, 64) for _ in range(5)]
    made = direct.Direct(described(), -1, (places[0], w), (1, 1, 1), (5,), (((6, 64), (64, 1)),))
    for i in (0, 1, 1, 0, 2, 3, 4, 0):
        assert made((places[i], w))
        assert driver.seen[-1].parameters[0][8:16] == struct.pack("Q", places[i].data_ptr())
        assert len(made._maps[0].found) <= 3
    assert driver.encoded == 6


def test_threads_do_not_write_into_each_other_s_launches(driver):
    kernel = plain()
    driver.sizes[HANDLE] = [8, 8, 4, 8, 8, 8]
    tensors = [(torch.zeros(1), None, torch.zeros(1)) for _ in range(8)]
    pairs = {each[0].data_ptr(): each[2].data_ptr() for each in tensors}
    made = direct.Direct(kernel, -1, tensors[0], (1, 1, 1), (77, 1, 3), ())
    begin, results = threading.Barrier(8), []

    def work(mine):
        begin.wait()
        results.extend(made(mine) for _ in range(200))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(each,)) for each in tensors]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(interval)
    assert results == [True] * 1600
    found = [tuple(struct.unpack("Q", each)[0] for each in seen.parameters[:2]) for seen in driver.seen]
    assert all(pairs[first] == second for first, second in found)
    assert {first: sum(each == first for each, _ in found) for first in pairs} == dict.fromkeys(pairs, 200)
    assert len(made._launch._spare) <= 8


# --- what is left to Triton


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_ctas": 2}, "a cluster"),
        ({"launch_cooperative_grid": True}, "a cooperative launch"),
        ({"global_scratch_size": 16}, "scratch memory"),
        ({"profile_scratch_size": 16}, "scratch memory"),
        ({"shared": 300_000}, "shared memory"),
        ({"target": SimpleNamespace(backend="hip")}, "no direct launch for hip"),
        ({"num_warps": None}, "in another way: TypeError"),
        ({"target": None}, "in another way: AttributeError"),
    ],
)
def test_what_a_direct_launch_cannot_do_is_said(driver, change, reason):
    assert reason in direct.fault(plain(**change))


@pytest.mark.parametrize("change", [{"fp4_padded": True}, {"is_im2col": True}, {"elem_type": 7}])
def test_other_descriptors_are_left_to_triton(driver, change):
    kernel = described()
    kernel.metadata.tensordesc_meta = [{**META, **change}]
    assert "in another way" in direct.fault(kernel)
    kernel.metadata.tensordesc_meta = []
    assert "tensordesc" in direct.fault(kernel)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".param .u32 k_param_2", ".param .u64 k_param_2"),
        (".param .u32 k_param_2", ".param .f32 k_param_2"),
        (".param .u64 k_param_3", ".param .u64 .ptr .global .align 1 k_param_3"),
        (".param .u64 .ptr .global .align 1 k_param_1", ".param .u64 k_param_1"),
        (".param .u64 .ptr .global .align 1 k_param_1", ".param .align 8 .b8 k_param_1[8]"),
        (",\n\t.param .u64 .ptr .global .align 1 k_param_5", ""),
        ("k_param_5\n", "k_param_5,\n\t.param .u64 .ptr .global .align 1 k_param_6\n"),
        (".visible .entry", ".entry"),
        (".reqntid", ".visible .entry other()\n.reqntid"),
    ],
)
def test_a_binary_that_takes_something_else_is_left_to_triton(driver, old, new):
    kernel = plain()
    kernel.asm["ptx"] = kernel.asm["ptx"].replace(old, new)
    assert new == "" or new in kernel.asm["ptx"]
    assert "would be passed" in direct.fault(kernel)


def test_a_map_of_another_size_or_alignment_is_left_to_triton(driver):
    for old, new in (("[128]", "[64]"), (".align 64", ".align 256")):
        kernel = described()
        kernel.asm["ptx"] = kernel.asm["ptx"].replace(old, new)
        assert "would be passed" in direct.fault(kernel)


def test_a_signature_that_cannot_be_passed_is_left_to_triton(driver):
    kernel = kernel_of({"a": "*i32", "f": "fp32"}, ["Q", "i", "Q", "Q"])
    assert "fp32" in direct.fault(kernel)
    del kernel.asm["ptx"]
    assert "KeyError" in direct.fault(kernel)


@pytest.mark.parametrize("problem", [OSError("libcuda.so.1: cannot open"), AttributeError("undefined symbol")])
def test_without_a_driver_to_call_triton_launches(driver, monkeypatch, problem):
    def missing():
        raise problem

    monkeypatch.setattr(direct, "library", missing)
    assert direct.fault(plain()) == f"the driver cannot be called: {problem}"


class Triton:
    """A kernel as `triton.jit` makes it, and what it compiles to: launches are counted."""

    def __init__(self, kernel):
        self.kernel, self.launched, self.of = kernel, 0, self

    def __getitem__(self, grid):
        def go(*_, **__):
            self.of.launched += 1
            return self.made

        return go

    @property
    def made(self):
        found = copy.copy(self)
        found.__dict__.update(vars(self.kernel), of=self)
        return found


def launch_of(kernel, index=-1):
    of = Triton(kernel)
    made = compiled.Compiled(of, {"SIZE": 4})
    return of, made, compiled.Launch(made, index, (3, 2, 1), (77, 1, 5))


TENSORS = (torch.zeros(4), None, torch.zeros(2))


def test_the_first_launch_is_triton_s_and_those_after_it_are_not(driver):
    of, made, go = launch_of(plain())
    driver.sizes[HANDLE] = [8, 8, 4, 8, 8, 8]
    for _ in range(4):
        go(TENSORS)
    assert (of.launched, len(driver.seen), made.by_triton, made.fault) == (1, 3, 1, None)
    other = compiled.Launch(made, -1, (1, 1, 1), (78, 1, 5))
    for _ in range(2):
        other(TENSORS)
    assert (of.launched, len(driver.seen)) == (1, 5)
    assert driver.seen[-1].grid == (1, 1, 1)


def test_a_refused_kernel_is_said_once_and_launched_by_triton(driver, caplog):
    of, made, go = launch_of(plain(num_ctas=2))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            go(TENSORS)
    assert (of.launched, made.by_triton, driver.seen) == (3, 3, [])
    assert [record.getMessage() for record in caplog.records] == [f"k is launched by Triton: {made.fault}"]


def test_an_error_of_the_driver_s_leaves_that_launch_to_triton(driver, caplog):
    of, made, go = launch_of(plain())
    driver.sizes[HANDLE] = [8, 8, 4, 8, 8, 8]
    go(TENSORS)
    driver.result = 201
    with caplog.at_level(logging.INFO):
        go(TENSORS)
    assert "the driver's result is 201" in caplog.text
    assert (of.launched, driver.seen, made.by_triton) == (2, [], 2)
    driver.result = 0
    go(TENSORS)
    assert (of.launched, len(driver.seen)) == (2, 1)


def test_a_map_that_cannot_be_made_leaves_the_launch_to_triton(driver):
    x, w = torch.zeros(6, 64), torch.zeros(3)
    made = direct.Direct(described(), -1, (x, w), (1, 1, 1), (5,), (((6, 64), (64, 1)),))
    driver.map_result = 1
    assert not made((x, w))
    assert made._maps[0].found == {}


@pytest.mark.parametrize("refused", ["result", "map_result"])
def test_a_thread_without_a_context_is_given_the_device_s(driver, refused):
    x, w = torch.zeros(6, 64), torch.zeros(3)
    driver.sizes[HANDLE] = [128, 4, 4, 8, 8, 8, 4, 8, 8]
    made = direct.Direct(described(), -1, (x, w), (1, 1, 1), (5,), (((6, 64), (64, 1)),))
    driver.cured = True
    setattr(driver, refused, 201)
    assert made((x, w))
    assert (driver.entered, len(driver.seen)) == ([-1], 1)


def test_who_hooks_into_launches_hears_of_all(driver, monkeypatch):
    of, _, go = launch_of(plain())
    driver.sizes[HANDLE] = [8, 8, 4, 8, 8, 8]
    go(TENSORS)
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook.add(print)
        try:
            go(TENSORS)
        finally:
            hook.remove(print)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)
    go(TENSORS)
    monkeypatch.undo()
    assert (of.launched, driver.seen) == (4, [])


def test_a_tensor_on_the_cpu_is_left_to_triton_which_says_so(driver, monkeypatch):
    of, _, go = launch_of(plain())
    go(TENSORS)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self is not TENSORS[2]))
    go(TENSORS)
    assert (of.launched, driver.seen) == (2, [])


def test_another_device_is_made_the_current_one(driver, monkeypatch):
    of, _, go = launch_of(plain(), index=1)
    driver.sizes[HANDLE] = [8, 8, 4, 8, 8, 8]
    current, entered = [0], []

    @contextlib.contextmanager
    def device_index(index):
        entered.append(index)
        current[0] = index
        yield
        current[0] = 0

    monkeypatch.setattr(cuda, "current_index", lambda: current[0])
    monkeypatch.setattr(cuda, "device_index", device_index)
    for _ in range(3):
        go(TENSORS)
    assert (of.launched, len(driver.seen), entered) == (1, 2, [1, 1, 1])


# --- a product that is like one before


class Product:
    """Stands in for a compiled kernel: its launch is the definition's product."""

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation

    def __getitem__(self, grid):
        def go(*arguments, **_):
            x, words, scales, alpha, bias, out = arguments[:6]
            weight = self.weight._replace(words=words, scales=scales, alpha=alpha)
            out.copy_(naive.linear(x, unshuffle(weight), bias, self.activation).view(out.shape))

        return go


@pytest.fixture
def gpu(driver, monkeypatch):
    """Products in place of the kernels', and how often a launch was chosen."""
    chosen = []
    monkeypatch.setattr(compiled, "_known", {})
    monkeypatch.setattr(launch, "_served", {})
    monkeypatch.setattr(launch, "facts", lambda _: ((9, 0), 132))
    monkeypatch.setattr(launch, "choose", lambda *_: chosen.append(1) or Decode(1, 8, 0, 4, 1))
    monkeypatch.setattr(plan, "_product", lambda *of, **_: compiled.Compiled(Product(of[1], of[3]), {}))
    return chosen


def ready(rows=64, width=64, activation=None):
    return shuffle(fp4.quantize(torch.randn(rows, width), "nvfp4"), torch.bfloat16, gated=activation == "swiglu")


def test_streams_do_not_count_together(monkeypatch):
    held, stream, capturing = torch.zeros(64, dtype=torch.int32), [0], [False]
    monkeypatch.setattr(counters, "_seats", {})
    monkeypatch.setattr(counters, "_made", {0: torch.zeros(counters.STREAMS, counters.EACH, dtype=torch.int32)})
    monkeypatch.setattr(cuda, "current_stream", lambda _: stream[0])
    monkeypatch.setattr(cuda.CudaDevice, "is_capturing", staticmethod(lambda: capturing[0]))

    def on(number, count=3):
        stream[0] = number
        found = counters.take(count, held, 0)
        assert len(found) >= count
        assert not found.any()
        return found.data_ptr()

    own = [on(number) for number in range(counters.STREAMS)]
    assert len(set(own)) == counters.STREAMS
    assert [on(number) for number in range(counters.STREAMS)] == own
    assert on(counters.STREAMS) not in own
    assert on(0, counters.EACH + 1) not in own
    capturing[0] = True
    assert on(0) == on(counters.STREAMS) == held.data_ptr()
    assert on(0, 65) not in (*own, held.data_ptr())


@pytest.mark.parametrize("activation", [None, "silu", "swiglu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (64,), (1, 64), (2, 1, 2, 64)])
def test_the_like_of_a_product_is_not_chosen_again(gpu, shape, has_bias, activation):
    weight, bias = ready(activation=activation), torch.randn(64).bfloat16() if has_bias else None
    for _ in range(3):
        x = torch.randn(shape).bfloat16()
        got = fp4.linear(x, weight, bias, activation)
        expected = naive.linear(x, unshuffle(weight), bias, activation)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
    assert len(gpu) == 1
    launch.forget()
    fp4.linear(x, weight, bias, activation)
    assert len(gpu) == 2


def test_what_is_not_alike_is_chosen_anew(gpu):
    weight, x = ready(), torch.randn(4, 64).bfloat16()
    memory = torch.randn(1000).bfloat16()
    for other in (x, x[:3], torch.randn(4, 128).bfloat16()[:, :64], memory[1:257].view(4, 64), x.view(2, 2, 64)):
        before = len(gpu)
        assert torch.equal(fp4.linear(other, weight), naive.linear(other, unshuffle(weight)))
        assert len(gpu) == before + 1
    for bias in (torch.randn(64).bfloat16(), torch.randn(64), torch.randn(65).bfloat16()[1:]):
        before = len(gpu)
        assert torch.equal(fp4.linear(x, weight, bias), naive.linear(x, unshuffle(weight), bias))
        assert len(gpu) == before + 1
    fp4.linear(x, ready(32))
    assert len(gpu) == before + 2


def test_what_has_to_be_copied_is_right_each_time(gpu):
    weight = ready()
    for _ in range(2):
        x = torch.randn(64, 4).bfloat16().T
        assert torch.equal(fp4.linear(x, weight), naive.linear(x, unshuffle(weight)))


def test_faults_are_found_before_and_after(gpu):
    weight, x = ready(), torch.randn(4, 64).bfloat16()
    for _ in range(2):
        fp4.linear(x, weight)
        with pytest.raises(Exception, match="expected x"):
            fp4.linear(torch.randn(4, 32).bfloat16(), weight)
        with pytest.raises(Exception, match="activation: expected one of"):
            fp4.linear(x, weight, None, "tanh")


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_a_weight_that_is_one_slab_is_recognised(gpu, monkeypatch, shape, has_bias, activation):
    monkeypatch.setattr(launch, "choose", lambda *_: gpu.append(1))  # None: a slab
    unpacked = []

    class Unpacking:
        index = -1

        def __init__(self, _, pairs, row, column):
            assert (pairs.shape, pairs.dtype, row, column) == ((64, 32), torch.int32, 0, 0)

        def __call__(self, tensors):
            words, scales, alpha, pairs = tensors
            unpacked.append(words)
            order = held[words.data_ptr()]
            assert scales is order.scales
            assert alpha is order.alpha
            pairs.view(torch.bfloat16).copy_(naive.dequantize(unshuffle(order), torch.bfloat16))

    monkeypatch.setattr(slab, "_in_pairs", Unpacking)
    bias = torch.randn(64).bfloat16() if has_bias else None
    one, other = ready(), ready()
    held = {order.words.data_ptr(): order for order in (one, other)}
    for order in (one, one, other):
        x = torch.randn(shape).bfloat16()
        got = fp4.linear(x, order, bias, activation)
        assert (got.shape, got.dtype) == ((*shape[:-1], 64), torch.bfloat16)
        expected = naive.linear(x.double(), unshuffle(order), None if bias is None else bias.double(), activation)
        assert (got.double() - expected).norm() < 6e-3 * expected.norm()
    assert [words is order.words for words, order in zip(unpacked, (one, one, other), strict=True)] == [True] * 3
    assert len(gpu) == 1


@pytest.mark.parametrize("why", ["scale", "order", "bias", "width", "size", "turns"])
def test_other_weights_come_in_slabs(driver, monkeypatch, why):
    monkeypatch.setattr(launch, "facts", lambda _: ((9, 0), 132))
    monkeypatch.setattr(slab, "_in_pairs", lambda *_: "unpacked at once")
    x, weight, bias = torch.randn(4, 64).bfloat16(), ready(), torch.randn(64).bfloat16()
    assert slab.whole(x, weight, bias, None).launch == "unpacked at once"
    if why == "scale":
        weight = weight._replace(exact=False)
    if why == "order":
        x = x.half()
    if why == "bias":
        bias = bias.float()
    if why == "width":
        weight, x = ready(width=63), x[:, :63]
    if why == "size":
        monkeypatch.setattr(slab, "SLAB_BYTES", 64 * 64 * 2 - 1)
    if why == "turns":
        weight = ready(activation="swiglu")
    assert slab.whole(x, weight, bias, None) is None


def test_gradients_flow_from_what_is_alike(gpu):
    weight, bias = ready(), torch.randn(64).bfloat16().requires_grad_()
    for _ in range(2):
        y = fp4.linear(torch.randn(4, 64).bfloat16(), weight, bias)
        (found,) = torch.autograd.grad(y, bias, torch.ones_like(y))
        assert torch.equal(found, torch.full_like(found, 4))
    assert len(gpu) == 1
