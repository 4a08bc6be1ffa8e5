"""Launches that leave Triton out, on a GPU: the same bits as by Triton's launcher, wherever they are made."""

import ctypes
import threading

import pytest
import torch

from apt_model.core.system import cuda
from apt_model.core.system.cuda_driver import library
from apt_model.ops import fp4
from apt_model.ops.fp4 import compiled, launch, slab
from apt_model.ops.fp4.layout import shuffle
from apt_model.ops.fp4.tables import Decode, Tile
from apt_model.optimization import FusedFP4Linear

pytest.importorskip("triton", reason="launches are of Triton's kernels")
from apt_model.ops.fp4 import direct

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
BF16 = torch.bfloat16
SETTINGS = [(Decode(2, 8, 0, 4, 2), 5), (Decode(1, 16, 0, 4, 1), 16)]
if HOPPER:
    SETTINGS += [(Decode(2, 8, 2, 4, 2), 1), (Decode(1, 16, 4, 8, 1), 16), (Decode(4, 8, 4, 4, 1, 2), 8)]
    SETTINGS += [
        (Tile(1, 8, 8, 3, 2), 5),
        (Tile(1, 64, 4, 3, 2), 64),
        (Tile(2, 128, 2, 3, 1), 300),
        (Tile(2, 256, 2, 3, 1), 256),
    ]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No launch has been made."""
    monkeypatch.setattr(compiled, "_known", {})
    launch.forget()
    yield
    launch.forget()


def kernels():
    return [each for each in compiled._known.values() if isinstance(each, compiled.Compiled)]


def all_direct(by_triton=1):
    """Every kernel was launched by Triton once, to compile it, and directly after that."""
    found = [(each.fault, each.by_triton) for each in kernels()]
    return bool(found) and found == [(None, by_triton)] * len(found)


def order(rows=256, width=1024, form="nvfp4", dtype=BF16):
    return shuffle(fp4.quantize(torch.randn(rows, width, device="cuda"), form), dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("setting", "count"), SETTINGS)
def test_a_product_has_the_same_bits(setting, count, has_bias):
    weight, x = order(), torch.randn(count, 1024, device="cuda", dtype=BF16)
    bias = torch.randn(256, device="cuda", dtype=BF16) if has_bias else None
    by_triton = launch.run(x, weight, bias, None, setting)
    for _ in range(3):
        assert torch.equal(launch.run(x, weight, bias, None, setting), by_triton)
    other = torch.randn_like(x)
    direct = launch.run(other, weight, bias, None, setting)
    assert all_direct()
    compiled._known.clear()
    assert torch.equal(launch.run(other, weight, bias, None, setting), direct)
    assert not torch.equal(direct, by_triton)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("ordered", [False, True])
def test_unpacking_has_the_same_bits(ordered, form, dtype):
    packed = fp4.quantize(torch.randn(200, 600, device="cuda"), form)
    weight = shuffle(packed, BF16) if ordered else packed
    found = [
        slab.unpack(weight, torch.full((70, 90), torch.nan, device="cuda", dtype=dtype), row=64, column=256)
        for _ in range(3)
    ]
    assert all_direct()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("count", [1, 16, 256])
def test_the_binary_s_parameters_are_of_the_sizes_that_are_passed(count):
    weight, x = order(), torch.randn(count, 1024, device="cuda", dtype=BF16)
    for _ in range(2):
        fp4.linear(x, weight)
    slab.unpack(weight, torch.empty(256, 1024, device="cuda", dtype=BF16))
    slab.unpack(weight, torch.empty(256, 1024, device="cuda", dtype=BF16))
    ask = getattr(library(), "cuFuncGetParamInfo", None)
    if ask is None:
        pytest.skip("the driver does not tell")
    launches = [each for each in compiled._known.values() if isinstance(each, compiled.Launch)]
    launches += [plan.launch for plan in launch._served.values()]
    assert len(launches) >= 2
    for each in launches:
        offset, size, sizes = ctypes.c_size_t(), ctypes.c_size_t(), []
        handle = ctypes.c_void_p(each.kernel.kernel.function)
        while not ask(handle, ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)):
            sizes.append(size.value)
        codes = {"Q": 8, "q": 8, "i": 4, "128s": 128}
        assert sizes == [codes[code] for code in direct._expected(each.kernel.kernel)]


def test_a_layer_falls_back_nowhere():
    if not HOPPER:
        pytest.skip("the rule for others is another")
    layer = FusedFP4Linear(1024, 512, device="cuda", dtype=BF16)
    for shape in ((1, 1024), (3, 5, 1024), (300, 1024), (2, 7000, 1024)):
        with torch.no_grad():
            found = [layer(torch.ones(shape, device="cuda", dtype=BF16)) for _ in range(3)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    assert all_direct()


def test_from_a_fresh_thread():
    weight, x = order(), torch.randn(16, 1024, device="cuda", dtype=BF16)
    expected, _ = fp4.linear(x, weight), fp4.linear(x, weight)
    found = []
    torch.cuda.synchronize()

    def work():
        found.extend(fp4.linear(x, weight) for _ in range(3))
        torch.cuda.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [torch.equal(each, expected) for each in found] == [True] * 3
    assert kernels()[0].by_triton <= 2, "only what has no context yet is Triton's"


@pytest.mark.parametrize("split", [1, 4])
def test_threads_at_the_same_time(split):
    weight = order()
    xs = [torch.randn(16, 1024, device="cuda", dtype=BF16) for _ in range(4)]
    setting = Decode(1, 16, 0, 4, split)
    expected = [launch.run(x, weight, None, None, setting) for x in xs]
    torch.cuda.synchronize()
    right = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [launch.run(xs[i], weight, None, None, setting) for _ in range(200)]
            torch.cuda.current_stream().synchronize()
        right.append(all(torch.equal(each, expected[i]) for each in found))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert right == [True] * 4


def test_on_a_side_stream_it_waits_for_that_stream():
    weight, x = order(), torch.zeros(16, 1024, device="cuda", dtype=BF16)
    source = torch.randn_like(x)
    for _ in range(2):
        expected = fp4.linear(source, weight)
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(200_000_000)
        x.copy_(source)
        got = fp4.linear(x, weight)
        seen = torch.cuda.Event()
        seen.record()
    assert not seen.query(), "the launch is behind what sleeps"
    aside.synchronize()
    assert torch.equal(got, expected)
    assert all_direct()


@pytest.mark.parametrize("count", [1, 64, 7000])
def test_in_a_cuda_graph(count):
    weight, x = order(), torch.randn(count, 1024, device="cuda", dtype=BF16)
    for _ in range(2):
        fp4.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp4.linear(x, weight)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, fp4.linear(x, weight))
    assert all_direct()


def test_in_inference_mode_and_out_of_it():
    weight, x = order(), torch.randn(16, 1024, device="cuda", dtype=BF16)
    for _ in range(2):
        with torch.inference_mode():
            inside = fp4.linear(x, weight)
        outside = fp4.linear(x, weight)
        assert (inside.is_inference(), outside.is_inference()) == (True, False)
        assert torch.equal(inside, outside)
    for shape, dtype in (((3, 5, 7), BF16), ((0, 4), torch.float32)):
        made = cuda.empty(shape, torch.empty(shape).stride(), dtype)
        like = torch.empty(shape, dtype=dtype, device="cuda")
        assert (made.shape, made.stride(), made.dtype, made.device) == (like.shape, like.stride(), dtype, like.device)


def test_a_tensor_in_the_wrong_place_is_an_error_and_not_read():
    weight, x = order(), torch.randn(16, 1024, device="cuda", dtype=BF16)
    bias = torch.randn(256, device="cuda", dtype=BF16)
    for _ in range(2):
        expected = fp4.linear(x, weight, bias)
    with pytest.raises(ValueError, match="cpu tensor"):
        fp4.linear(x, weight, bias.cpu())
    assert torch.equal(fp4.linear(x, weight, bias), expected)


def test_who_hooks_into_launches_hears_of_them():
    from triton import knobs

    weight, x = order(), torch.randn(16, 1024, device="cuda", dtype=BF16)
    for _ in range(2):
        fp4.linear(x, weight)
    heard = []
    hook = lambda *said: heard.append(said)  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        fp4.linear(x, weight)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    fp4.linear(x, weight)
    assert len(heard) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    weight, x = order(), torch.randn(16, 1024, device="cuda", dtype=BF16)
    expected = fp4.linear(x, weight)
    there, other = (
        weight._replace(
            **{
                part: getattr(weight, part).to("cuda:1")
                for part in ("words", "scales", "global_scale", "alpha", "counters")
            }
        ),
        x.to("cuda:1"),
    )
    for _ in range(3):
        got = fp4.linear(other, there)
        assert got.device == other.device
        assert torch.equal(got.to("cuda:0"), expected)
    assert torch.cuda.current_device() == 0
