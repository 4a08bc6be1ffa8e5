"""`apt-model plan`: reads headers alone, without torch; every option does something; mistakes end in four lines."""

import json
import os
import subprocess
import sys
import types

import pytest

from apt_model.cli.capacity import capacity
from apt_model.cli.main import main
from apt_model.core.errors import ConfigError
from apt_model.core.tensor_files import TensorWriter
from apt_model.core.tensor_folders import index_text
from apt_model.vgpu import rates
from apt_model.vgpu.rates import Rates

GIB = 2**30
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
MACHINE = Rates(
    device="a card", link_gbps=50.0, disk_gbps=5.0, memory_gbps=3000.0, attention_tflops=400.0, launch_s=8e-6,
    hook_s=1e-4,
    products={"BF16": ((1, 2.0), (256, 300.0), (4096, 650.0)), "F32": ((1, 1.0), (4096, 50.0))},
    fp4_products=((1, 6.0), (256, 300.0), (4096, 640.0)),
)  # fmt: skip


def llama(folder, sizes, layers, *, vocabulary=1024, shards=1, dtype="BF16"):
    """A model's folder whose weights are holes in files: sizes without bytes."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    small = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    shapes["model.norm.weight"] = (width,)
    for i in range(layers):
        block = {
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (small, width), "self_attn.v_proj": (small, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    folder.mkdir()
    config = {**sizes, "num_hidden_layers": layers, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "rope_theta": 1e4, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names, homes, total = sorted(shapes), {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: (dtype, shapes[name]) for name in names[shard::shards]}
        writer = TensorWriter(folder / file, part)
        writer._file.close()
        homes |= dict.fromkeys(part, file)
        total += writer.size
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(index_text(homes, total, {}))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_PLAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "small", SMALL, 8)


@pytest.fixture
def machine(tmp_path):
    return str(rates.keep(MACHINE, tmp_path / "rates.json"))


def asked(capsys, *args):
    """What the command says as JSON."""
    code = main(["plan", *map(str, args), "--format", "json"])
    said = json.loads(capsys.readouterr().out)
    assert code == 0, said
    return said


def refused(capsys, *args):
    """Exit code and lines of an error."""
    code = main(["plan", *map(str, args)])
    shown = capsys.readouterr()
    assert shown.out == ""
    return code, shown.err.splitlines()


def test_a_model_larger_than_this_machine_is_planned_without_torch_and_without_its_weights(tmp_path):
    """140 GB that are holes: only a few thousand bytes of the files exist."""
    folder = llama(tmp_path / "large", LARGE, 80, vocabulary=128256, shards=30)
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) > 140e9
    code = f"""
import builtins, io, pathlib, sys
read = 0
whole = pathlib.Path.open
class Counted:
    def __init__(self, file): self.file = file
    def __enter__(self): self.file.__enter__(); return self
    def __exit__(self, *error): return self.file.__exit__(*error)
    def read(self, *size):
        global read
        data = self.file.read(*size); read += len(data)
        return data
    def __getattr__(self, name): raise AssertionError(f"{{name}} of a file of weights")
def opened(path, mode="r", *args, **options):
    file = whole(path, mode, *args, **options)
    return Counted(file) if path.suffix == ".safetensors" else file
pathlib.Path.open = opened
from apt_model.cli.main import main
code = main(["plan", {str(folder)!r}, "--gpu", "24GiB", "--ram", "64GiB", "--ssd", "200GiB", "--tokens", "8192"])
heavy = {{"torch", "numpy", "safetensors", "transformers", "triton"}} & set(sys.modules)
print(code, read, sorted(heavy), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, read, heavy = done.stderr.splitlines()[-1].split(" ", 2)
    assert (exit_code, heavy) == ("0", "[]")
    assert 10_000 < int(read) <= on_disk
    lines = done.stdout.splitlines()
    assert lines[0].endswith("large: 131.4 GiB of weights in BF16")
    rows = {line.split()[0]: line.split() for line in lines[2:5]}
    assert rows["cuda"][1:3] == ["24.0", "GiB"]
    assert [int(rows[level][-1]) > 0 for level in ("cuda", "cpu", "ssd")] == [True] * 3


def test_the_levels_hold_everything_within_their_capacity(small, capsys):
    said = asked(capsys, small, "--gpu", "4MB", "--ram", "3MB", "--ssd", "1GB")
    levels = said["plan"]["levels"]
    assert [each["device"] for each in levels] == ["cuda", "cpu", "ssd"]
    assert all(0 < each["planned_mb"] <= each["capacity_mb"] for each in levels)
    assert said["weights"]["dtype"] == "BF16"


def test_without_rates_no_time_is_said(small, capsys):
    said = asked(capsys, small, "--gpu", "4MB", "--ram", "1GB")["plan"]
    assert [said[name] for name in ("pass_s", "compute_s", "link_s", "disk_s", "bound")] == [None] * 5
    assert main(["plan", str(small), "--gpu", "4MB", "--ram", "1GB"]) == 0
    shown = capsys.readouterr().out
    assert "not predicted, as not all rates are known" in shown
    assert "next      apt-model plan --measure" in shown
    assert main(["plan", str(small), "--gpu", "4MB", "--ram", "1GB", "--quiet"]) == 0
    assert "next" not in capsys.readouterr().out


BASE = ("--gpu", "4MB", "--ram", "1GB", "--tokens", "65536")
EFFECTS = {
    "--gpu": ("5MB", "levels"), "--ram": ("2GB", "levels"), "--ssd": ("1GB", "levels"), "--tokens": ("128", "tokens"),
    "--batch": ("4", "compute_s"), "--slots": ("2", "slots"), "--quantize": ("nvfp4", "streamed_mb"),
    "--dtype": ("fp32", "streamed_mb"), "--device": ("cpu", "levels"), "--link-gbps": ("3", "link_s"),
    "--tflops": ("3", "compute_s"),
}  # fmt: skip


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_does_something(option, small, capsys, machine):
    other, where = EFFECTS[option]
    before = asked(capsys, small, *BASE, "--rates", machine)["plan"]
    after = asked(capsys, small, *BASE, "--rates", machine, option, other)["plan"]
    assert before[where] != after[where]


def test_the_disks_rate_is_an_option_too(small, capsys, machine):
    args = (small, "--gpu", "4MB", "--ram", "3MB", "--ssd", "1GB", "--rates", machine)
    assert asked(capsys, *args)["plan"]["disk_s"] * 5 == pytest.approx(
        asked(capsys, *args, "--disk-gbps", "25")["plan"]["disk_s"] * 25, rel=0.7
    )
    assert asked(capsys, *args, "--disk-gbps", "0.01")["plan"]["bound"] == "disk"


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_bits_of_a_weight(form, small, capsys):
    dense, packed = (
        asked(capsys, small, "--gpu", "1GB", *option)["weights"]["bytes"] for option in ((), ("--quantize", form))
    )
    tables = 2 * 2 * 1024 * 256
    assert (packed - tables) / (dense - tables) == pytest.approx({"nvfp4": 4.5, "mxfp4": 4.25}[form] / 16, rel=0.01)


def test_few_tokens_wait_for_the_link_and_many_do_not(small, capsys, machine):
    args = ("--gpu", "4MB", "--ram", "1GB", "--rates", machine, "--link-gbps", "0.05")
    few = asked(capsys, small, *args, "--tokens", "1")["plan"]
    assert few["bound"] == "link"
    assert few["pass_s"] == pytest.approx(few["link_s"], rel=0.1)
    enough = few["tokens_for_slow_down"]
    for tokens, good in ((enough, True), (enough - 1, False)):
        many = asked(capsys, small, *args, "--tokens", tokens, "--batch", tokens)["plan"]
        assert (many["pass_s"] <= 1.15 * many["compute_s"]) == good


def test_what_was_measured_here_is_taken(small, capsys):
    rates.keep(MACHINE)
    assert asked(capsys, small, *BASE)["rates"]["device"] == "a card"
    assert asked(capsys, small, *BASE, "--device", "cpu")["rates"]["link_gbps"] is None


def test_measuring_keeps_its_rates_where_it_is_told(capsys, tmp_path, monkeypatch):
    machine = types.ModuleType("apt_model.vgpu.machine")
    machine.measure = lambda device, dtypes: Rates(
        device=device.name(), kind="cpu", products=dict.fromkeys(dtypes, ((1, 1.0),))
    )
    monkeypatch.setitem(sys.modules, "apt_model.vgpu.machine", machine)
    assert asked(capsys, "--measure")["kept_in"] == str(rates.kept_file("cpu"))
    assert set(rates.kept("cpu").products) == {"BF16", "F32"}
    elsewhere = tmp_path / "here.json"
    assert asked(capsys, "--measure", "--rates", elsewhere)["kept_in"] == str(elsewhere)
    assert rates.read(elsewhere) == rates.kept("cpu")
    assert main(["plan", "--measure"]) == 0
    assert "kept in" in capsys.readouterr().out


def test_the_least_that_works_works_and_less_does_not(small, capsys):
    least = asked(capsys, small, "--gpu", "1GB")["least"]

    def works(gpu, ram):
        return main(["plan", str(small), "--gpu", f"{gpu}B", "--ram", f"{ram}B"]) == 0

    assert works(least["gpu"], least["ram"])
    assert not works(least["gpu"] - 4096, 10**12)
    assert not works(least["gpu"], least["ram"] - 4096)
    capsys.readouterr()


def test_what_does_not_fit_names_what_would(small, capsys):
    code, lines = refused(capsys, small, "--gpu", "0.4MB", "--ram", "1GB")
    assert (code, len(lines)) == (7, 4)
    assert lines[0].startswith("APT-E070  level 1 has room for")
    assert lines[2].startswith("remedy    the least that works: --gpu ")
    words = lines[2].split()
    gpu, ram = words[words.index("--gpu") + 1], words[words.index("--ram") + 1].rstrip(";")
    assert asked(capsys, small, "--gpu", gpu, "--ram", ram)["plan"]["slots"] > 0
    code, lines = refused(capsys, small, "--gpu", "4MB", "--ram", "1MB")
    assert "with this --gpu the least that works: --ram" in lines[2]
    words = lines[2].split()
    assert asked(capsys, small, "--gpu", "4MB", "--ram", words[words.index("--ram") + 1].rstrip(";"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{}", "--gpu", "x"], "--gpu: expected an amount of memory above 0, got 'x'"),
        (["{}", "--gpu", "0"], "--gpu: expected an amount of memory above 0, got '0'"),
        (["{}", "--gpu", "4GiBs"], "--gpu: expected an amount"),
        (["{}"], "missing: --gpu"),
        ([], "missing: MODEL"),
        (["{}", "--gpu", "1GB", "--ssd", "1GB"], "--ssd: expected --ram too"),
        (["{}", "--gpu", "1GB", "--slots", "0"], "--slots: expected a whole number from 1 on"),
        (["{}", "--gpu", "1GB", "--tokens", "7", "--batch", "2"], "--tokens: expected a multiple of --batch 2"),
        (["{}", "--gpu", "1GB", "--tflops", "-1"], "--tflops: expected a number above 0"),
        (["{}", "--gpu", "1GB", "--rates", "nowhere.json"], "nowhere.json holds no rates"),
        (["nowhere", "--gpu", "1GB"], "nowhere: expected a model's folder, or a model of the Hugging Face Hub"),
    ],
)
def test_mistakes_are_named(args, said, small, capsys):
    code, lines = refused(capsys, *[arg.format(small) for arg in args])
    assert code in (2, 3)
    assert said in lines[0]
    assert lines[-1].startswith("more      apt-model --explain APT-E0")
    assert len(lines) <= 4


def test_files_that_cannot_be_trusted_are_refused(tmp_path, capsys):
    folder = llama(tmp_path / "cut", SMALL, 2)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    code, lines = refused(capsys, folder, "--gpu", "1GB")
    assert (code, lines[0].startswith("APT-E020")) == (3, True)
    (folder / "config.json").unlink()
    assert main(["plan", str(folder), "--gpu", "1GB"]) == 3
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * GIB), ("24GB", 24 * 10**9), ("2000MB", 2 * 10**9), ("2000", 2 * 10**9), ("1.5 gib", 3 * GIB // 2),
     (".5KB", 500), ("7B", 7), ("1TiB", 2**40)],
)  # fmt: skip
def test_amounts(text, count):
    assert capacity(text, "--gpu") == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "nan", "1 2", "0.0000001", "5 parsecs"])
def test_what_is_no_amount(text):
    with pytest.raises(ConfigError, match="--gpu: expected an amount of memory"):
        capacity(text, "--gpu")


# Rates.


def test_rates_are_the_same_after_a_file(tmp_path):
    assert rates.read(rates.keep(MACHINE, tmp_path / "a" / "rates.json")) == MACHINE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"link_gbps": 0}, "link_gbps: expected a number above 0"),
        ({"link_gbps": "fast"}, "link_gbps: expected a number above 0"),
        ({"hook_s": -1}, "hook_s: expected a number from 0 on"),
        ({"kind": "tpu"}, "kind: expected 'gpu' or 'cpu'"),
        ({"products": {"BF16": [[4, 1.0], [1, 2.0]]}}, "BF16: expected pairs of rows, rising"),
        ({"products": {"BF16": [[1, 0.0]]}}, "BF16: expected pairs"),
        ({"products": {"BF16": 3}}, "holds no rates"),
        ({"link_gpbs": 3}, "did you mean 'link_gbps'"),
        ({"version": 2}, "version: expected 1"),
    ],
)
def test_rates_that_are_none(change, said, tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({**json.loads(MACHINE.to_json()), **change}))
    with pytest.raises(ConfigError) as caught:
        rates.read(path)
    assert said in str(caught.value)


def test_between_rows_rates_are_on_a_line_in_logarithms():
    curve = ((1, 2.0), (100, 200.0))
    assert [rates.at(curve, rows) for rows in (0.5, 1, 10, 100, 1000)] == pytest.approx([2, 2, 20, 200, 200])


# The Hub.


@pytest.fixture
def hub(monkeypatch, small):
    """`huggingface_hub` as the command uses it, with one model."""
    client = pytest.importorskip("huggingface_hub", reason="needs the extra hf")
    from huggingface_hub import errors

    from apt_model.core.tensor_folders import open_folder

    downloaded = []

    def metadata(repository):
        if repository == "org/pickled":
            raise errors.NotASafetensorsRepoError("no safetensors")
        if repository not in ("org/small", "org/odd"):
            raise OSError(f"{repository} is not there")
        entries = open_folder(small).entries
        tensors = {name: types.SimpleNamespace(dtype=e.dtype, shape=list(e.shape)) for name, e in entries.items()}
        if repository == "org/odd":
            tensors["odd"] = types.SimpleNamespace(dtype="U3", shape=[8])
        return types.SimpleNamespace(files_metadata={"model.safetensors": types.SimpleNamespace(tensors=tensors)})

    def download(_, name):
        downloaded.append(name)
        return str(small / name)

    monkeypatch.setattr(client, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(client, "hf_hub_download", download)
    return downloaded


def test_a_model_of_the_hub_is_planned_from_its_headers(hub, small, capsys):
    remote, local = (asked(capsys, model, "--gpu", "4MB", "--ram", "1GB") for model in ("org/small", small))
    assert remote["plan"] == local["plan"]
    assert hub == ["config.json"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/pickled", "has no safetensors"),
        ("org/unknown", "cannot be looked up on the Hub"),
        ("org/odd", "tensors of type U3"),
    ],
)
def test_what_the_hub_has_not(name, said, hub, capsys):
    code, lines = refused(capsys, name, "--gpu", "4MB")
    assert code == 3
    assert said in lines[0]


def test_a_hub_that_is_not_there_is_said():
    """The real client, with nobody at the address."""
    pytest.importorskip("huggingface_hub", reason="needs the extra hf")
    code = "import sys; from apt_model.cli.main import main; sys.exit(main(['plan', 'org/name', '--gpu', '1GB']))"
    alone = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alone, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("APT-E020  org/name cannot be looked up on the Hub")


def test_without_the_client_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, lines = refused(capsys, "org/name", "--gpu", "4MB")
    assert code == 6
    assert "pip install 'apt-transformer[hf]'" in lines[1]
