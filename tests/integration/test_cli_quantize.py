"""`apt-model quantize` as a user runs it, and what can be done with the folder that it makes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fp4_folders import experts, layers, write_folder
from micro import train_config
from small_models import noise, tokens

from apt_model.cli import bytes_progress
from apt_model.cli import main as cli
from apt_model.core.errors import CheckpointError, InputError
from apt_model.integrations.fp4_files import open_fp4
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.modeling.apt_model import APTModel
from apt_model.ops.fp4 import dequantize
from apt_model.trainer.checkpoint import step_folder
from apt_model.trainer.runs import find_model
from apt_model.trainer.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(capfd):
    """Runs `apt-model`; gives its exit code and both streams. An error must come without a traceback."""

    def run(*args):
        capfd.readouterr()
        code = cli.main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", layers())


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory, texts):
    """A finished run of our own model that no test changes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    Trainer(train_config(out, texts, data={"task": "causal"})).run()
    return out


@pytest.fixture
def run(kept_run, tmp_path):
    return Path(shutil.copytree(kept_run, tmp_path / "run"))


@pytest.fixture
def quantized(call, run):
    """A folder made from the run."""
    assert call("quantize", run, "--format", "nvfp4", "--out", run.with_name("fp4"))[0] == 0
    return run.with_name("fp4")


# The command


def test_the_command_says_what_became_of_every_tensor(call, folder, tmp_path):
    code, out, err = call("quantize", folder, "--format", "nvfp4", "--out", tmp_path / "out")
    assert code == 0
    assert out.isascii()
    assert f"{folder} -> {tmp_path / 'out'}" in out
    assert "14 of 18 tensors became nvfp4" in out
    row = next(line for line in out.splitlines() if "layers.*.mlp.down_proj.weight" in line).split()
    assert row[1] == "2"
    assert 0 < float(row[-1]) < 0.0075
    assert "lm_head.weight" in out
    assert "the output projection, by its name" in out
    assert "18 tensors; asking the model for its layers" in err
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "quantized.json", "tokenizer.json"}
    assert open_fp4(tmp_path / "out").scheme.format == "nvfp4"


def test_in_json_it_says_it_of_each(call, folder, tmp_path):
    code, out, err = call(
        "quantize", folder, "--format", "nvfp4", "--format", "json", "--out", tmp_path / "out", "--quiet"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told == {**json.loads((tmp_path / "out" / "quantized.json").read_text()), "seconds": told["seconds"]}
    assert {each["name"] for each in told["tensors"]} == layers().keys()
    assert all(each["reason"] for each in told["tensors"])
    assert all((each["error"] is not None) == each["converted"] for each in told["tensors"])
    assert told["bytes_after"] < 0.6 * told["bytes_before"]


@pytest.mark.parametrize(
    ("args", "form"),
    [
        ("", "nvfp4"),
        ("--weights mxfp4", "mxfp4"),
        ("--format=mxfp4", "mxfp4"),
        ("--format json --format mxfp4", "mxfp4"),
        ("--format=json --weights=mxfp4", "mxfp4"),
        ("--format human --format nvfp4", "nvfp4"),
    ],
)
def test_format_means_the_weights_or_the_output(call, folder, tmp_path, args, form):
    code, out, _ = call("quantize", folder, "--out", tmp_path / "out", *args.split())
    assert code == 0
    assert out.startswith("{") == ("json" in args)
    assert open_fp4(tmp_path / "out").scheme.format == form


def test_format_before_the_command_is_the_output(call, folder, tmp_path):
    code, out, _ = call("--format", "json", "quantize", folder, "--format", "mxfp4", "--out", tmp_path / "out")
    assert code == 0
    assert json.loads(out)["weights"] == "mxfp4"


def test_a_dry_run_writes_nothing_and_knows_the_bytes(call, folder, tmp_path):
    code, out, _ = call("quantize", folder, "--dry-run")
    assert code == 0
    assert "14 of 18 tensors would become nvfp4" in out
    assert f"apt-model quantize {folder} --format nvfp4 --out DIR2" in out
    planned = json.loads(call("quantize", folder, "--dry-run", "--format", "json")[1])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    done = json.loads(call("quantize", folder, "--format", "json", "--out", tmp_path / "out")[1])
    assert planned["bytes_after"] == done["bytes_after"]
    sizes = sum(tensor.nbytes for _, tensor in _tensors(tmp_path / "out"))
    assert done["bytes_after"] == sizes


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").items()


def test_skipped_layers_stay(call, folder, tmp_path):
    args = ["quantize", folder, "--out", tmp_path / "out", "--format", "json", "--skip", "layers.1", "*.k_proj"]
    told = json.loads(call(*args)[1])
    converted = {each["name"] for each in told["tensors"] if each["converted"]}
    assert len(converted) == 6
    assert not any("layers.1" in name or "k_proj" in name for name in converted)
    reasons = {each["name"]: each["reason"] for each in told["tensors"]}
    assert reasons["model.layers.0.self_attn.k_proj.weight"] == "asked for: --skip *.k_proj"
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.up_proj" in ignored


REFUSED = [
    ("{model}", 2, "missing: --out DIR2", "--dry-run"),
    ("{model} --out {model}", 2, "--out: {model} exists", "rm -r {model}"),
    ("{model} --out {tmp}/out --format nvfp5", 2, "expected nvfp4 or mxfp4 (the weights), human or json", ""),
    ("{model} --out {tmp}/out --weights fp4", 2, "--weights", "quantize --help"),
    ("{model} --out {tmp}/out --skip layers.9", 2, "--skip layers.9: no tensor", ""),
    ("{model} --out {tmp}/out --skip o_prj", 2, "--skip o_prj", "did you mean o_proj?"),
    ("{model} --out {tmp}/out --layout gguf", 2, "--layout", ""),
    ("{model} --out {tmp}/out --device xpu", 5, "xpu", ""),
    ("{tmp}/none --out {tmp}/out", 3, "no such folder", ""),
    ("{tmp} --out {tmp}/out", 3, "holds neither model.safetensors", ""),
    ("--out {tmp}/out", 2, "missing: DIR", ""),
    ("{model} --out {tmp}/out --quick", 2, "no option --quick", ""),
]


@pytest.mark.parametrize("refused", REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_done_is_refused(call, folder, tmp_path, refused):
    line, code, message, remedy = refused
    names = {"model": folder, "tmp": tmp_path}
    found, _, err = call("quantize", *line.format(**names).split())
    assert found == code
    assert message.format(**names) in err
    assert remedy.format(**names) in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (
        json.loads(call("quantize", *line.format(**names).split(), "--format", "json")[1])["error"]["exit_code"] == code
    )


def test_a_disk_that_is_full_is_said_before_the_work(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    code, _, err = call("quantize", folder, "--out", tmp_path / "out")
    assert code == 2
    assert "has 5" in err


def test_a_disk_that_fills_leaves_nothing_behind(call, folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("apt_model.core.tensor_files.TensorWriter.write", fail)
    code, _, err = call("quantize", folder, "--out", tmp_path / "out")
    assert code == 3
    assert "No space left on device" in err
    assert f"{folder} is as it was, and there is no {tmp_path / 'out'}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_lines_of_progress_come_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 6.0])
    monkeypatch.setattr(bytes_progress.time, "monotonic", lambda: next(clock))
    with bytes_progress.bytes_progress(2**21, quiet=False) as progress:
        progress(2**18, "a")  # too soon
        progress(2**18, "b")
        progress(0, "c")
        progress(2**19, "d")
    assert capsys.readouterr().err.splitlines() == [
        " 25%  512 KiB of 2 MiB  9 s left  b",
        " 50%  1 MiB of 2 MiB  6 s left  d",
    ]
    with bytes_progress.bytes_progress(9, quiet=True) as progress:
        progress(1, "a")
    assert capsys.readouterr().err == ""


def test_a_bar_moves_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with bytes_progress.bytes_progress(9, quiet=False) as progress:
        assert isinstance(progress, bytes_progress.Bar)
        progress(9, "layer")


# A process that is killed


_SLOW = """
import signal, sys, time
from pathlib import Path
from apt_model.integrations import quantize_tensors
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
from apt_model.integrations.quantize_files import quantize_folder
quantize_tensors.SLAB_WEIGHTS = 64
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), on_bytes=lambda *_: (print("x", flush=True), time.sleep(0.01)))
"""


@pytest.mark.parametrize("pieces", [1, 20, 80])
def test_a_killed_process_leaves_no_half_of_a_folder(folder, tmp_path, call, pieces):
    out = tmp_path / "out"
    command = [sys.executable, "-c", _SLOW, str(folder), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        for _ in range(pieces):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert any(path.name.startswith(".partial-out-") for path in tmp_path.iterdir())
    assert call("quantize", folder, "--out", out)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]  # what was half-written is gone too


def test_an_interrupted_process_cleans_up(folder, tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(folder), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            process.stdout.readline()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Our own model


def test_a_run_becomes_a_folder_of_fp4_layers(call, quantized, run):
    model = APTModel.from_pretrained(quantized)
    before = APTModel.from_pretrained(step_folder(run, 4))
    layers_ = {name: module for name, module in model.named_modules() if isinstance(module, FusedFP4Linear)}
    assert len(layers_) == 2 * 5  # in, out, self-value, up, down
    assert "lm_head" not in layers_
    weights = open_fp4(quantized)
    for name, module in layers_.items():
        values = dequantize(weights.read_weight(f"{name}.weight", module.in_features), torch.float32)
        assert torch.equal(module.dequantize(), values)
        with torch.no_grad():
            before.get_submodule(name).weight.copy_(values)
    ids = tokens(2, 9, high=260)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), before(ids), rtol=1e-4, atol=1e-4)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("weight_" in name for name in trainable)
    assert {"embedding.weight", "lm_head.weight", "decoder_norm.weight"} <= trainable


def test_what_it_makes_is_saved_and_moved_as_any_model(quantized, tmp_path):
    model = APTModel.from_pretrained(quantized)
    model.save_pretrained(tmp_path / "again")
    again = APTModel.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    ids = tokens(1, 5, high=260)
    with torch.no_grad():
        assert torch.equal(APTModel.from_pretrained(tmp_path / "again")(ids), model(ids))
        assert again(ids).dtype == torch.bfloat16
    one, other = (json.loads((path / "config.json").read_text()) for path in (quantized, tmp_path / "again"))
    assert one["quantization_config"] == other["quantization_config"]
    plain = APTModel(model.config)
    plain.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_model_in_two_formats_cannot_be_saved(quantized):
    model = APTModel.from_pretrained(quantized)
    model.decoder_layers[0].attention.body.out_proj = FusedFP4Linear(32, 32, bias=False, format="mxfp4")
    with pytest.raises(InputError, match="one FP4 format in a model, got mxfp4 and nvfp4"):
        model.save_pretrained(quantized.with_name("mixed"))


def test_eval_gives_bits_per_byte_before_and_after(call, quantized, run):
    code, out, _ = call("eval", quantized)
    assert code == 0
    found = json.loads((quantized / "eval.json").read_text())
    assert not (run / "eval.json").exists()
    assert found["weights"] == "nvfp4"
    whole = json.loads(call("eval", run, "--format", "json")[1])
    assert (whole["weights"], whole["before"]) == (None, None)
    assert found["before"]["bits_per_byte"] == whole["bits_per_byte"]
    assert 0 < abs(found["bits_per_byte"] - whole["bits_per_byte"]) < 0.05 * whole["bits_per_byte"]
    rows = [line for line in out.splitlines() if "this model (nvfp4)" in line or "before it was quantised" in line]
    figures = [f"{found['bits_per_byte']:.4f}", f"{whole['bits_per_byte']:.4f}"]
    assert [line.split()[-4] for line in rows] == figures
    assert f"{quantized}, step 4 of 4" in out


def test_generate_and_info_take_it(call, quantized):
    code, out, _ = call("generate", quantized, "--prompt", "value_1 = ", "--max-new-tokens", 4)
    assert code == 0
    assert out.startswith("value_1 = ")
    assert call("info", quantized)[0] == 0


def test_a_quantised_folder_is_checked_before_it_is_used(call, quantized):
    weights = quantized / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for command in (["generate", quantized, "--prompt", "x"], ["eval", quantized]):
        code, _, err = call(*command)
        assert code == 3
        assert "model.safetensors was altered" in err
        assert "make it again from the step that it came from" in err


def test_without_its_run_it_still_generates_and_says_why_it_is_not_scored(call, quantized, run):
    shutil.rmtree(run)
    assert find_model(quantized).run is None
    assert call("generate", quantized, "--prompt", "x", "--max-new-tokens", 2)[0] == 0
    code, _, err = call("eval", quantized)
    assert code == 3
    assert "run that it was made from is not at" in err


def test_step_folders_and_saved_models_are_quantised_too(call, run, tmp_path):
    step = step_folder(run, 4)
    assert call("quantize", step, "--out", tmp_path / "from-step")[0] == 0
    assert find_model(tmp_path / "from-step").step == 4
    APTModel.from_pretrained(step).save_pretrained(tmp_path / "saved")
    assert call("quantize", tmp_path / "saved", "--format", "mxfp4", "--out", tmp_path / "from-saved")[0] == 0
    packed = APTModel.from_pretrained(tmp_path / "from-saved").decoder_layers[0].feed_forward.body.up_proj
    assert packed.format == "mxfp4"


def test_a_run_is_not_trained_further_in_four_bits(call, quantized):
    code, _, err = call("train", "--out", quantized, "--resume")
    assert code == 3
    assert "holds no run" in err


def test_our_own_layout_is_the_only_one_for_our_models(call, run, tmp_path):
    code, _, err = call("quantize", run, "--layout", "compressed-tensors", "--out", tmp_path / "out")
    assert code == 2
    assert "opened by this package alone" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda config: config.pop("quantization_config"),
            "packed in 4 bits, and config.json has no quantization_config",
        ),
        (lambda config: config["quantization_config"].update(format="mxfp4", group_size=32), "is torch.float8_e4m3fn"),
        (lambda config: config["quantization_config"].update(quant_method="gptq"), "expected 'apt_fp4', got 'gptq'"),
        (lambda config: config.update(quantization_config=3), "expected an object, got 3"),
        (lambda config: config.update(d_ff=128), "does not fit its config.json"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(quantized, change, words):
    config = json.loads((quantized / "config.json").read_text())
    change(config)
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        APTModel.from_pretrained(quantized)
    assert words in caught.value.message


def test_words_about_packed_weights_without_any_are_refused(run, quantized):
    shutil.copyfile(step_folder(run, 4) / "model.safetensors", quantized / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not packed, and config\.json has a quantization_config"):
        APTModel.from_pretrained(quantized)


def test_a_packed_layer_that_the_model_has_not_is_refused(run, quantized):
    from safetensors.torch import load_file, save_file

    tensors = load_file(quantized / "model.safetensors")
    tensors = {name.replace("out_proj", "outer_proj"): tensor for name, tensor in tensors.items()}
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"outer_proj is packed, and the model has no linear layer there"):
        APTModel.from_pretrained(quantized)


def test_files_of_other_kinds_are_not_copied_and_named(call, tmp_path):
    folder = write_folder(tmp_path / "model", {**layers(count=1), **experts()})
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "original").mkdir()
    (folder / ".cache").mkdir()
    (folder / "modeling.py").write_text("raise SystemExit('code in the folder was run')")
    code, out, _ = call("quantize", folder, "--out", tmp_path / "out")
    assert code == 0
    assert "not copied" in out
    assert "original, pytorch_model.bin" in out
    assert (tmp_path / "out" / "modeling.py").is_file()
    assert not (tmp_path / "out" / "original").exists()


def test_a_weight_that_is_zero_has_no_error(call, tmp_path):
    folder = write_folder(tmp_path / "model", {"a.weight": torch.zeros(16, 32), "b.weight": noise(16, 32)})
    told = json.loads(call("quantize", folder, "--out", tmp_path / "out", "--format", "json")[1])
    assert {each["name"]: each["error"] for each in told["tensors"]}["a.weight"] == 0
