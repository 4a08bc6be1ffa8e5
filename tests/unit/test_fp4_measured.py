"""What is measured, kept and chosen, on a machine that only says it has a GPU; and once with a real one."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from apt_model.core.errors import ConfigError, InputError
from apt_model.core.system import measurements
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.measurements import Machine
from apt_model.ops import fp4
from apt_model.ops.fp4 import launch, measured, naive, select, slab
from apt_model.ops.fp4.layout import shuffle, unshuffle
from apt_model.ops.fp4.tables import H100, H200, Decode, Tile, of_card
from apt_model.optimization import FusedFP4Linear, quantize, tune

pytest.importorskip("triton", reason="launches are for Triton's kernels")
CUDA = torch.cuda.is_available()
MACHINE = Machine("NVIDIA L4", "8.9", "3.9.0")
SHAPE = (1024, 512)
NAME = "1024 x 512, block 16, bfloat16, 8 rows"
BEST = Decode(1, 8, 0, 4, 2)


class Gpu:
    """Stands in for a GPU: products are the definition's, times those of `times` (10 us where there is none)."""

    def __init__(self):
        self.card, self.capability, self.processors = "NVIDIA L4", (8, 9), 58
        self.times, self.faults, self.launched = {}, {}, []

    def product(self, x, weight, bias, activation, setting=None):
        self.launched.append(setting)
        fault = self.faults.get(setting, 0.0)
        if isinstance(fault, Exception):
            raise fault
        return naive.linear(x, unshuffle(weight), bias, activation) * (1 + fault)

    def seconds(self, work, _):
        before = len(self.launched)
        work()
        return sum(self.times.get(each, 10.0) for each in self.launched[before:]) * 1e-6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_FP4_CACHE", str(tmp_path / "kept"))
    fresh()
    yield tmp_path / "kept"
    fresh()


def fresh():
    """As in a new process."""
    measured.forget()
    measurements.say_once.cache_clear()


@pytest.fixture
def gpu(folder, monkeypatch):
    made = Gpu()
    monkeypatch.setattr(launch, "facts", lambda _: (made.capability, made.processors))
    monkeypatch.setattr(launch, "table", lambda _: of_card(made.card))
    monkeypatch.setattr(launch, "run", made.product)
    monkeypatch.setattr(slab, "linear", made.product)
    monkeypatch.setattr(measured, "_seconds", made.seconds)
    monkeypatch.setattr(measured, "_machine", lambda _: MACHINE)
    monkeypatch.setattr(CudaDevice, "cache_bytes", lambda _: 2**18)
    monkeypatch.setattr(CudaDevice, "free_memory", lambda _: 2**30)
    return made


def weight_of(shape=SHAPE, dtype=torch.bfloat16, **options):
    return shuffle(fp4.quantize(torch.randn(*shape) * 0.02, "nvfp4"), dtype, **options)


def the_file(folder):
    (found,) = folder.iterdir()
    return found


# --- the files


def test_what_is_kept_is_there_for_the_next_process(folder):
    assert measurements.load(MACHINE) == {}
    entries = {"a": {"launch": "slabs", "microseconds": 1.5}}
    assert measurements.keep(MACHINE, entries) == entries
    assert measurements.load(MACHINE) == entries
    assert the_file(folder).name == "nvidia-l4-8.9-triton-3.9.0-v1.json"
    held = json.loads(the_file(folder).read_text())
    assert (held["version"], held["device"], held["capability"], held["triton"]) == (1, *MACHINE)


def test_what_others_wrote_meanwhile_stays_and_the_newest_counts(folder):
    measurements.keep(MACHINE, {"a": {"launch": "slabs"}, "b": {"launch": "slabs"}})
    every = measurements.keep(MACHINE, {"b": {"launch": "tile"}, "c": {"launch": "decode"}})
    assert every == {"a": {"launch": "slabs"}, "b": {"launch": "tile"}, "c": {"launch": "decode"}}
    assert measurements.load(MACHINE) == every


@pytest.mark.parametrize("other", [{"device": "NVIDIA T4"}, {"capability": "7.5"}, {"triton": "3.8.0"}])
def test_another_machine_has_another_file(folder, other):
    measurements.keep(MACHINE, {"a": {"launch": "slabs"}})
    assert measurements.load(MACHINE._replace(**other)) == {}
    measurements.keep(MACHINE._replace(**other), {})
    assert len(list(folder.iterdir())) == 2


HEAD = {"version": 1, **MACHINE._asdict()}
BAD = {
    "half written": '{"version": 1, "device"',
    "empty": "",
    "no text": b"\xff\xfe\x00\x80",
    "brackets": "[" * 100_000,
    "a list": "[1]",
    "another version": json.dumps({**HEAD, "version": 2, "entries": {"a": {}}}),
    "another device": json.dumps({**HEAD, "device": "NVIDIA T4", "entries": {"a": {}}}),
    "no entries": json.dumps(HEAD),
    "entries of another kind": json.dumps({**HEAD, "entries": {"a": 1}}),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_trusted_is_named_once_and_ignored(folder, caplog, text):
    path = measurements.file_of(MACHINE)
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert [measurements.load(MACHINE) for _ in range(3)] == [{}] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert "ignored" in record.getMessage()
    measurements.keep(MACHINE, {"a": {"launch": "slabs"}})
    assert measurements.load(MACHINE) == {"a": {"launch": "slabs"}}


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog, gpu):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("APT_FP4_CACHE", str(tmp_path / "file" / "kept"))
    gpu.times[BEST] = 1.0
    weight = weight_of()
    measured.measure(weight, [1])
    assert "for this process only" in caplog.text
    assert launch.choose(1, weight, torch.bfloat16) == BEST


def test_a_write_that_fails_leaves_the_file_as_it_was(folder, monkeypatch):
    measurements.keep(MACHINE, {"a": {"launch": "slabs"}})
    before = the_file(folder).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert measurements.keep(MACHINE, {"b": {"launch": "slabs"}}).keys() == {"a", "b"}
    assert the_file(folder).read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "caches", "expected"),
    [
        ("/a/b", "/caches", "/a/b"),
        ("", "/caches", "/caches/apt_model/fp4"),
        ("", "relative", "/users/me/.cache/apt_model/fp4"),
        ("", "", "/users/me/.cache/apt_model/fp4"),
    ],
)
def test_the_folder_is_the_user_s_to_say(monkeypatch, asked, caches, expected):
    for name, value in (("APT_FP4_CACHE", asked), ("XDG_CACHE_HOME", caches), ("HOME", "/users/me")):
        monkeypatch.setenv(name, value)
    assert measurements.folder() == Path(expected)


def test_no_home_is_no_crash(monkeypatch, caplog):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("APT_FP4_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    measurements.say_once.cache_clear()
    assert measurements.load(MACHINE) == {}
    assert measurements.keep(MACHINE, {"a": {}}) == {"a": {}}
    assert caplog.text.count("home directory") == 2


# --- what is tried


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 256, 6144])
@pytest.mark.parametrize("shape", [(64, 256), (768, 768), (1000, 960), (14336, 4096)])
def test_only_hopper_gets_what_is_hopper_s(shape, rows):
    for each in measured.candidates(rows, *shape, False, 58):
        assert isinstance(each, Decode)
        assert each.kept == 0
        assert rows <= each.bm
    for each in measured.candidates(rows, *shape, True, 132):
        if isinstance(each, Decode):
            assert rows <= each.bm
            assert each.kept * each.split * 256 >= shape[1]


@pytest.mark.parametrize(("shape", "hopper"), [((768, 768), False), ((3072, 768), True), ((1024, 4096), True)])
def test_small_weights_have_something_to_try(shape, hopper):
    assert len(measured.candidates(8, *shape, hopper, 132)) > 3


@pytest.mark.parametrize("table", [H100, H200], ids=["H100", "H200"])
def test_the_shipped_table_is_among_what_is_tried(table):
    missing = [key for key, each in table.items() if each not in measured.candidates(key[2], key[0], key[1], True, 132)]
    assert not missing


def test_no_more_are_tried_than_is_said(gpu, monkeypatch):
    monkeypatch.setattr(measured, "MOST_TRIED", 3)
    weight = weight_of()
    assert len(measured.candidates(8, *SHAPE, False, gpu.processors)) > 3
    measured.measure(weight, [1])
    assert len(set(gpu.launched)) == 5  # three, the rule's and slabs


# --- what is taken


def test_the_fastest_is_taken_at_once_and_in_the_next_process(gpu, folder):
    weight = weight_of()
    usual = launch.choose(1, weight, torch.bfloat16)
    assert usual not in (BEST, None)
    gpu.times[BEST] = 1.25
    assert measured.measure(weight, [1]) == [measured.Measured(8, BEST, pytest.approx(1.25), usual, pytest.approx(10))]
    assert launch.choice(5, weight, torch.bfloat16) == (BEST, "measured on this machine")
    fresh()
    assert launch.choice(5, weight, torch.bfloat16) == (BEST, "measured on this machine")
    entries = json.loads(the_file(folder).read_text())["entries"]
    assert entries == {NAME: {"launch": "decode", **BEST._asdict(), "microseconds": 1.25}}


def test_it_is_taken_for_nothing_else(gpu):
    weight, other, half = weight_of(), weight_of((2048, 512)), weight_of(dtype=torch.float16)
    gpu.times[BEST] = 1.0
    measured.measure(weight, [3])
    assert launch.choose(9, weight, torch.bfloat16) != BEST
    for each in (other, half):
        assert launch.choice(1, each, each.dtype).why == "by rule"
    fresh()
    (the := measurements.file_of(MACHINE)).unlink()
    assert not the.exists()
    assert launch.choice(1, weight, torch.bfloat16).why == "by rule"


def test_slabs_may_be_the_fastest(gpu):
    weight = weight_of()
    gpu.times[None] = 1.0
    (found,) = measured.measure(weight, [16])
    assert found.setting is None
    fresh()
    assert launch.choice(16, weight, torch.bfloat16) == (None, "measured on this machine")


def test_wrong_and_failing_launches_are_left_out_and_named(gpu, caplog):
    caplog.set_level(logging.INFO, logger="apt_model")
    weight = weight_of()
    usual = launch.choose(1, weight, torch.bfloat16)
    wrong, failing, nothing = Decode(2, 8, 0, 4, 2), Decode(1, 8, 0, 4, 2), Decode(1, 8, 0, 4, 1)
    assert len({usual, wrong, failing, nothing}) == 4
    gpu.faults = {wrong: 0.02, failing: RuntimeError("out of shared memory\nand more"), nothing: float("nan")}
    gpu.times = dict.fromkeys((wrong, failing, nothing), 1.0)
    (found,) = measured.measure(weight, [1])
    assert found.setting not in (wrong, failing, nothing)
    assert found.microseconds == pytest.approx(10)
    for each, why in ((wrong, "2.0e-02 off the definition"), (failing, "RuntimeError: out of shared memory")):
        assert any(str(each) in record.getMessage() and why in record.getMessage() for record in caplog.records), why


def test_the_launch_of_the_rules_may_fail_here(gpu):
    weight = weight_of()
    usual = launch.choose(1, weight, torch.bfloat16)
    gpu.faults[usual] = ValueError("no such instruction")
    (found,) = measured.measure(weight, [1])
    assert found.before == usual
    assert found.before_microseconds is None
    assert launch.choose(1, weight, torch.bfloat16) == found.setting != usual


def test_where_everything_fails_nothing_is_kept(gpu, folder):
    weight = weight_of()
    gpu.faults = dict.fromkeys(
        [None, launch.choose(1, weight, torch.bfloat16), *measured.candidates(8, *SHAPE, False, 58)], ValueError("no")
    )
    assert measured.measure(weight, [1]) == []
    assert launch.choice(1, weight, torch.bfloat16).why == "by rule"


@pytest.mark.parametrize(
    "entry",
    [
        {"launch": "decode", **BEST._replace(split=7)._asdict()},
        {"launch": "decode", **BEST._replace(kept=4)._asdict()},
        {"launch": "tile", **Tile(1, 64, 4, 3, 1)._asdict()},
        {"launch": "decode"},
        {"launch": "decode", **BEST._asdict(), "more": 1},
        {"launch": ["decode"]},
        {},
    ],
)
def test_an_entry_that_is_no_launch_here_is_not_launched(gpu, caplog, entry):
    measurements.keep(MACHINE, {NAME: {**entry, "microseconds": 1.0}})
    fresh()
    weight = weight_of()
    assert {launch.choice(rows, weight, torch.bfloat16).why for rows in (1, 2, 3)} == {"by rule"}
    assert caplog.text.count("is ignored") == 1
    assert NAME in caplog.text


def test_gated_weights_and_random_numbers_stay_as_they_are(gpu):
    weight, before = weight_of((256, 512), gated=True), torch.get_rng_state()
    assert measured.measure(weight, [1])
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_take_turns_so_that_the_cache_serves_none(gpu, monkeypatch):
    weight = weight_of((256, 512))
    held = weight.words.nbytes + weight.scales.nbytes
    copies = measured._copies(weight)
    assert len(copies) * held >= 4 * 2**18
    assert len({each.words.data_ptr() for each in copies}) == len(copies)
    monkeypatch.setattr(CudaDevice, "free_memory", lambda _: 6 * held)
    assert len(measured._copies(weight)) == 3


def test_each_bucket_is_measured_once_with_its_largest_number(gpu):
    found = measured.measure(weight_of((256, 512)), [16, 3, 12, 1, 64])
    assert [each.rows for each in found] == [8, 16, 64]


@pytest.mark.parametrize("rows", [[], [0], [1, 6145], [1.0], [True]])
def test_rows_that_nothing_is_chosen_for_are_refused(gpu, rows):
    with pytest.raises(ConfigError, match=r"measure\.rows: expected numbers from 1 to 6144, got"):
        measured.measure(weight_of((64, 256)), rows)


# --- what is said


def on_cuda(weight):
    """The weight, as far as `explain` looks at it, on a GPU."""
    return weight._replace(words=SimpleNamespace(device=torch.device("cuda", 0), shape=weight.words.shape))


def test_explain_says_where_the_choice_is_from(gpu):
    weight = weight_of()
    say = lambda rows: select.explain(rows, on_cuda(weight), torch.bfloat16)  # noqa: E731
    assert say(1).endswith(" by rule")
    assert say(64).endswith("for torch's own product, by rule")
    gpu.times[BEST] = 1.0
    measured.measure(weight, [1, 64])
    launch.forget()
    assert say(1).endswith(f"{BEST} measured on this machine")
    assert say(64).endswith("for torch's own product, measured on this machine")
    gpu.capability, gpu.processors = (9, 0), 132
    launch.forget()
    wide = weight._replace(out_features=28672, in_features=8192)
    for card, table in (("NVIDIA H100 80GB HBM3", H100), ("NVIDIA H200", H200), ("NVIDIA GH200 480GB", H200)):
        gpu.card = card
        launch.forget()
        assert f"{table[28672, 8192, 8]} from the shipped table" in select.explain(1, on_cuda(wide), torch.bfloat16)
    assert H100[28672, 8192, 8] != H200[28672, 8192, 8]


# --- tune


@pytest.fixture
def ordered(gpu, monkeypatch):
    """Layers take the kernels' order on the CPU too."""
    monkeypatch.setattr(fp4, "wants_order", launch.serves)
    return gpu


def model_of(dtype=torch.bfloat16):
    layers = [nn.Linear(512, 1024), nn.Linear(1024, 512), nn.Linear(512, 1024, bias=False)]
    return quantize(nn.Sequential(*layers).to(dtype), report=lambda _: None)


def test_tune_measures_each_shape_once_and_reports(ordered, caplog):
    caplog.set_level(logging.INFO, logger="apt_model.optimization")
    ordered.times[BEST] = 1.0
    model = model_of()
    report = tune(model, rows=(1, 16))
    assert [(each.out_features, each.in_features, each.format) for each in report.shapes] == [
        (1024, 512, "nvfp4"),
        (512, 1024, "nvfp4"),
    ]
    assert [[each.rows for each in shape.launches] for shape in report.shapes] == [[8, 16], [8, 16]]
    assert report.shapes[0].launches[0].setting == BEST
    first = str(report).splitlines()[0]
    assert first.startswith(f"1024 x 512 in nvfp4, bfloat16, up to 8 rows: {BEST}, 1.0 us (before: Decode(")
    assert first.endswith(", 10.0 us)")
    assert len(caplog.records) == 2
    weight = model[2].operand("weight", torch.bfloat16)
    assert launch.choose(1, weight, torch.bfloat16) == BEST


def test_tune_takes_the_type_of_autocast(ordered):
    with torch.autocast("cpu", torch.bfloat16):
        report = tune(model_of(torch.float32), rows=[1])
    assert {each.dtype for each in report.shapes} == {torch.bfloat16}


def test_tune_takes_layers_with_swiglu(ordered):
    layer = FusedFP4Linear(512, 256, activation="swiglu", dtype=torch.bfloat16)
    assert tune(layer, rows=[1]).shapes[0].launches


@pytest.mark.parametrize(
    ("model", "said", "remedy"),
    [
        (lambda: nn.Linear(4, 4), "got Linear without one", r"quantize\(model\)"),
        (model_of, "got 3 that none does, the last for torch.bfloat16 on cpu", r"model\.to\('cuda', torch\.bfloat16\)"),
    ],
)
def test_tune_says_what_to_do_where_there_is_nothing_to_measure(folder, model, said, remedy):
    with pytest.raises(InputError, match=f"(?s)^tune: expected .*{said}.*{remedy}"):
        tune(model())
    assert not folder.exists()


def test_a_type_without_kernels_is_nothing_to_measure(ordered):
    with pytest.raises(InputError, match=r"the last for torch\.float32"):
        tune(model_of(torch.float32))


def test_tune_checks_the_rows_before_anything_else():
    with pytest.raises(ConfigError, match=r"tune\.rows: expected numbers from 1 to 6144, got \(7000,\)"):
        tune(nn.Linear(4, 4), rows=[7000])


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_a_layer_is_tuned_for_real(folder, activation, monkeypatch):
    monkeypatch.setattr(measured, "MOST_TRIED", 4)
    layer = FusedFP4Linear(1024, 1024, activation=activation, device="cuda", dtype=torch.bfloat16)
    if not launch.serves(fp4.NVFP4, layer.weight_packed.device, torch.bfloat16):
        pytest.skip("the kernels need a GPU from Ampere on")
    report = tune(layer, rows=(1, 16, 64))
    assert [each.rows for each in report.shapes[0].launches] == [8, 16, 64]
    assert all(0 < each.microseconds < 10_000 for each in report.shapes[0].launches)
    assert len(json.loads(the_file(folder).read_text())["entries"]) == 3
    fresh()
    for rows in (1, 8, 16, 40):
        assert "measured on this machine" in layer.explain(rows)
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        expected = naive.linear(x.double(), layer.packed_weight("weight"), layer.bias.double(), activation)
        error = float((layer(x).detach().double() - expected.detach()).norm() / expected.detach().norm())
        assert error < 5e-3, error
