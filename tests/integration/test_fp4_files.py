"""Folders of FP4 weights: values, other libraries' files both ways, and refusals that come before any data is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fp4_folders import experts, layers, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import noise
from tolerances import assert_close

from apt_model.core import fp4_storage
from apt_model.core.errors import CheckpointError, ConfigError
from apt_model.core.tensor_files import TensorWriter, read_header
from apt_model.core.tensor_folders import open_folder
from apt_model.integrations import fp4_files, fp4_schemes
from apt_model.integrations.fp4_files import open_fp4
from apt_model.integrations.outline import outline
from apt_model.integrations.quantize_config import QuantizeConfig
from apt_model.integrations.quantize_files import quantize_folder
from apt_model.ops.fp4 import FORMATS, PackedWeight, dequantize, quantize

ROOT = Path(__file__).parents[2]
FORMS = ("nvfp4", "mxfp4")


@pytest.fixture(params=[1, 3], ids=["one file", "three files"])
def folder(request, tmp_path):
    return write_folder(tmp_path / "model", layers(), shards=request.param)


def convert(folder, **options):
    """Quantise beside the folder; what came of it, and the folder opened."""
    out = folder.with_name("out")
    report = quantize_folder(folder, out, QuantizeConfig(device="cpu", **options))
    return report, open_fp4(out)


def same(one, other):
    """Bit for bit."""
    return all(
        (a is None and b is None) or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one[:3], other[:3], strict=True)
    )


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# Values


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_quantised_as_its_tensors_are(folder, form, monkeypatch):
    monkeypatch.setattr("apt_model.integrations.quantize_tensors.SLAB_WEIGHTS", 200)  # six rows and a bit
    report, found = convert(folder, weights=form)
    before = tensors_of(folder)
    assert len(found.weights) == len(report.converted) == 14
    for each in report.converted:
        weight = found.read_weight(each.name)
        whole = quantize(before[each.name], form)
        if weight.global_scale is None or torch.equal(weight.global_scale, whole.global_scale):
            assert same(weight, whole), each.name
        error = (dequantize(weight, torch.float32) - before[each.name]).square().sum() / before[
            each.name
        ].float().square().sum()
        assert each.error == pytest.approx(float(error), rel=1e-5)
        assert each.error < {"nvfp4": 0.0075, "mxfp4": 0.016}[form]
    for name in found.others:
        assert torch.equal(found.read(name), before[name])
    assert set(found.others) == before.keys() - found.weights.keys()
    assert report.bytes_before == sum(tensor.nbytes for tensor in before.values())
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors_of(found.tensors.folder).values())


def test_layers_that_run_as_one_product_share_their_global_scale(folder):
    _, found = convert(folder)
    scale = {name: float(found.read_weight(name).global_scale) for name in found.weights}
    alone = {name: float(quantize(tensor).global_scale) for name, tensor in tensors_of(folder).items() if name in scale}
    for partners in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        names = [f"model.layers.1.{partner}.weight" for partner in partners]
        assert len({alone[name] for name in names}) > 1  # or the test would say nothing
        assert {scale[name] for name in names} == {min(alone[name] for name in names)}
    assert scale["model.layers.1.mlp.down_proj.weight"] == alone["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_have_a_global_scale_each(tmp_path, turned):
    folder = write_folder(tmp_path / "model", {**layers(count=1), **experts(turned=turned)})
    report, found = convert(folder)
    assert report.layout == "apt"
    assert "experts" in report.layout_reason
    for name, tensor in experts().items():
        weight = found.read_weight(name)
        assert same(weight, quantize(tensor))
        assert weight.global_scale.unique().numel() == 3


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_length_are_padded_in_our_layout(tmp_path, form):
    tensors = layers(width=20, hidden=36, count=1)
    folder = write_folder(tmp_path / "model", tensors)
    report, found = convert(folder, weights=form)
    assert report.layout == "apt"
    name = "model.layers.0.self_attn.o_proj.weight"
    assert same(found.read_weight(name, 20), quantize(tensors[name], form))
    _, kept = convert(write_folder(tmp_path / "again" / "model", {**tensors, **layers(count=2)}), layout="apt")
    assert kept.weights.keys() >= found.weights.keys()


def test_everything_is_streamed_once(folder):
    _, found = convert(folder)
    names = [name for name, _ in found.stream()]
    assert sorted(names) == sorted(tensors_of(folder))
    kinds = {name: type(value) for name, value in found.stream()}
    assert {name for name, kind in kinds.items() if kind is PackedWeight} == found.weights.keys()


def test_a_folder_that_holds_nothing_to_convert_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model", {"norm.weight": noise(8), "embed.weight": noise(8, 32)})
    with pytest.raises(CheckpointError, match="holds no weight of a linear layer"):
        convert(folder)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, form, value):
    tensors = layers()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    folder = write_folder(tmp_path / "model", tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.(gate|up)_proj\.weight: .*not finite"):
        convert(folder, weights=form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# The safetensors library


def test_what_is_written_is_what_the_library_reads(folder):
    _, found = convert(folder)
    for header in found.tensors.headers:
        with safe_open(header.path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == header.entries.keys()
    for name, tensor in tensors_of(found.tensors.folder).items():
        assert torch.equal(tensor.view(torch.uint8), found.read(name).view(torch.uint8))


def test_headers_are_read_as_the_library_writes_them(tmp_path):
    kinds = {
        "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "half": torch.ones(3, dtype=torch.float16),
        "flag": torch.tensor([True]), "e5m2": torch.ones(5).to(torch.float8_e5m2), "long": torch.arange(3),
    }  # fmt: skip
    save_file(kinds, tmp_path / "file.safetensors")
    entries = read_header(tmp_path / "file.safetensors").entries
    assert {name: entry.shape for name, entry in entries.items()} == {name: (*t.shape,) for name, t in kinds.items()}


def test_a_writer_notices_bytes_that_were_not_given(tmp_path):
    with (
        pytest.raises(AssertionError, match="not all bytes of"),
        TensorWriter(tmp_path / "file.safetensors", {"a": ("U8", (4,))}) as writer,
    ):
        writer.write("a", memoryview(b"abc"))


# compressed-tensors


@pytest.fixture
def library():
    """The real one."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (Python 3.11 and later)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    def scheme(form):
        return preset_name_to_scheme(f"{form.upper()}A16", ["Linear"])

    def compressor(form):
        return BaseCompressor.get_value_from_registry(f"{form}-pack-quantized")

    return scheme, compressor, QuantizationConfig


def parts_of(tensors, base):
    """The tensors of one layer by their local names."""
    return {name.removeprefix(f"{base}."): tensor for name, tensor in tensors.items() if name.startswith(f"{base}.")}


@pytest.mark.parametrize("form", FORMS)
def test_the_library_reads_our_values_bit_for_bit(folder, library, form):
    scheme, compressor, _ = library
    _, found = convert(folder, weights=form)
    assert found.scheme.method == "compressed-tensors"
    tensors = tensors_of(found.tensors.folder)
    for name in found.weights:
        theirs = compressor(form).decompress(parts_of(tensors, name.removesuffix(".weight")), scheme(form))["weight"]
        assert torch.equal(theirs, dequantize(found.read_weight(name), theirs.dtype)), name


@pytest.mark.parametrize("form", FORMS)
def test_we_read_the_librarys_values_bit_for_bit(tmp_path, library, form):
    scheme, compressor, config = library
    args = scheme(form).weights
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    tensors, expected = {}, {}
    for name, weight in layers(dtype=torch.float32).items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        blocks = weight.unflatten(-1, (-1, FORMATS[form].block))
        low, high = blocks.amin(-1), blocks.amax(-1)
        divisor = generate_gparam(low.amin(), high.amax()) if form == "nvfp4" else None
        scale, _ = calculate_qparams(low, high, args, global_scale=divisor)
        state = {"weight": weight, "weight_scale": scale}
        state |= {} if divisor is None else {"weight_global_scale": divisor.reshape(1)}
        packed = compressor(form).compress(state, scheme(form))
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{part}": tensor.contiguous() for part, tensor in packed.items()}
        expected[name] = compressor(form).decompress(packed, scheme(form))["weight"]
    made = config(
        config_groups={"group_0": scheme(form)}, format=f"{form}-pack-quantized", quantization_status="compressed"
    )
    folder = write_folder(tmp_path / "theirs", tensors, quantization_config=json.loads(made.model_dump_json()))
    found = open_fp4(folder)
    assert (found.scheme.format, found.scheme.notes) == (form, ())
    assert found.weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(dequantize(found.read_weight(name), weight.dtype), weight), name


@pytest.mark.parametrize("form", FORMS)
def test_our_config_is_the_librarys_own(folder, library, form):
    scheme, _, config = library
    convert(folder, weights=form)
    ours = json.loads((folder.with_name("out") / "config.json").read_text())["quantization_config"]
    theirs = scheme(form)
    theirs.format = f"{form}-pack-quantized"
    expected = config(
        config_groups={"group_0": theirs}, format=f"{form}-pack-quantized", quantization_status="compressed",
        ignore=ours["ignore"],
    )  # fmt: skip
    assert config.model_validate(ours).model_dump() == expected.model_dump()
    assert ours["ignore"] == ["lm_head"]


def test_what_the_library_would_also_do_is_said(tmp_path, library):
    _, _, config = library
    from compressed_tensors.quantization import preset_name_to_scheme

    for group in (preset_name_to_scheme("NVFP4", ["Linear"]), ["Linear"]):
        values = config(config_groups={"NVFP4": group}, format="nvfp4-pack-quantized").model_dump(mode="json")
        values |= {"quantization_status": "compressed"}
        values["config_groups"] = {"NVFP4": group} if isinstance(group, list) else values["config_groups"]
        found = fp4_schemes.read_scheme(values, "config.json")
        assert found.format == "nvfp4"
        assert "activations" in found.notes[0]


@pytest.mark.parametrize("form", FORMS)
def test_transformers_opens_our_files_without_us(tmp_path, library, form):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = llama(transformers).bfloat16()  # the type that the library unpacks to
    model.save_pretrained(tmp_path / "model")
    report, found = convert(tmp_path / "model", weights=form)
    assert (report.decided_by, report.layout) == ("LlamaForCausalLM", "compressed-tensors")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        f"m = M.from_pretrained({str(tmp_path / 'out')!r}); m(torch.arange(9)[None])\n"  # unpacks at the first call
        "assert not any(name.startswith('apt_model') for name in sys.modules)\n"
        f"torch.save(m.state_dict(), {str(tmp_path / 'state')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state", weights_only=True)
    for name in found.weights:
        assert torch.equal(state[name], dequantize(found.read_weight(name), torch.bfloat16)), name
    assert all(torch.equal(state[name], found.read(name)) for name in found.others)


def llama(transformers, kind="Llama", **changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**options, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


# ModelOpt


def modelopt(folder, *, nested=False):
    """A folder as ModelOpt writes it, and the values that it holds."""
    tensors, expected = layers(count=1), {}
    for name, weight in list(tensors.items()):
        if name.endswith("proj.weight"):
            multiplier = weight.float().abs().amax() / (6 * 448)  # no power of two
            made = quantize(weight / multiplier)
            scale = (made.scale.float() / made.global_scale).to(torch.float8_e4m3fn)
            ones = PackedWeight(made.packed, scale, torch.ones(1), made.in_features)
            expected[name] = dequantize(ones, torch.float32) * multiplier
            parts = {"weight_scale": scale, "weight_scale_2": multiplier, "input_scale": torch.tensor(0.5)}
            tensors[name] = made.packed
            tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    words = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    if nested:
        write_folder(folder, tensors)
        told = {"producer": {"name": "modelopt"}, "quantization": words}
        (folder / "hf_quant_config.json").write_text(json.dumps(told))
    else:
        write_folder(folder, tensors, quantization_config={"quant_method": "modelopt", **words})
    return folder, expected


@pytest.mark.parametrize("nested", [False, True], ids=["config.json", "hf_quant_config.json"])
def test_modelopts_scale_is_a_multiplier(tmp_path, nested):
    folder, expected = modelopt(tmp_path / "model", nested=nested)
    found = open_fp4(folder)
    assert found.weights.keys() == expected.keys()
    assert all(name.endswith("input_scale") for name in found.left_out)
    for name, values in expected.items():
        assert_close("definition_fp32", dequantize(found.read_weight(name), torch.float32), values)
        assert (values - layers(count=1)[name].float()).square().sum() < 0.02 * values.square().sum()


@pytest.mark.parametrize("layout", ["auto", "compressed-tensors"])
def test_modelopts_weights_are_brought_into_another_layout_value_for_value(tmp_path, library, layout):
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter

    folder, _ = modelopt(tmp_path / "model")
    report, found = convert(folder, layout=layout)
    assert report.converted == []
    assert found.scheme.method == {"auto": "apt_fp4"}.get(layout, layout)
    assert "activations" in report.notes[0]
    theirs = ModelOptNvfp4Converter(targets=["re:.*proj"]).process(tensors_of(folder))
    ours = tensors_of(found.tensors.folder)
    assert ours.keys() == {name for name in theirs if not name.endswith("input_global_scale")}
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].reshape(tensor.shape).view(torch.uint8)), name
    kept = json.loads((found.tensors.folder / "config.json").read_text())["quantization_config"]
    assert {"ignore", "modules_to_not_convert"} & kept.keys()
    assert kept.get("ignore", kept.get("modules_to_not_convert")) == ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "mxfp4"}, "--weights mxfp4: .* holds nvfp4 already"),
        ({"skip": ("lm_head",)}, "--skip: .* is quantised already"),
        ({"layout": "compressed-tensors"}, "there is nothing to do"),
    ],
)
def test_what_cannot_be_done_to_fp4_weights_is_said(folder, options, words):
    convert(folder)
    with pytest.raises(ConfigError, match=words):
        quantize_folder(folder.with_name("out"), folder.with_name("twice"), QuantizeConfig(**options))
    assert not folder.with_name("twice").exists()


# Models of transformers


def test_conv1d_is_turned_and_tied_weights_and_routers_are_kept(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "model")
    report, found = convert(tmp_path / "model")
    assert report.layout == "apt"
    assert "Conv1D" in report.layout_reason
    assert {each.name.split(".")[-2] for each in report.converted} == {"c_attn", "c_proj", "c_fc"}
    for name in found.weights:
        assert same(found.read_weight(name), quantize(model.get_parameter(name).T))
    kept = {each.name: each.reason for each in report.kept}
    assert kept["transformer.wte.weight"] == "an embedding"
    words = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert words["modules_to_not_convert"] == ["lm_head"]


def test_experts_of_a_mixture_are_converted_one_by_one(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = llama(transformers, "Qwen3Moe", num_experts=3, moe_intermediate_size=32, head_dim=16, num_experts_per_tok=2)
    model.save_pretrained(tmp_path / "model")
    report, found = convert(tmp_path / "model")
    assert report.layout == "apt"  # transformers loses the experts' global scales in compressed-tensors
    assert "48371" in report.layout_reason
    names = [name for name in found.weights if ".experts." in name]
    assert len(names) == 2 * 3 * 3
    reasons = {each.reason for each in report.kept if each.name.endswith("mlp.gate.weight")}
    assert reasons == {"of a Qwen3MoeTopKRouter"}
    for form, notes in (("nvfp4", 1), ("mxfp4", 0)):
        out = tmp_path / form
        told = quantize_folder(tmp_path / "model", out, QuantizeConfig(weights=form, layout="compressed-tensors"))
        assert len(told.notes) == notes


def test_an_outline_tells_what_only_looks_like_a_linear_layer():
    model = torch.nn.Module()
    model.up, model.down, model.table = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4)
    model.conv, model.twin, model.head = torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model.twin.weight = model.down.weight
    model.get_output_embeddings = lambda: model.head
    names = {"a.up.weight": "up.weight"} | {name: name for name in (*dict(model.named_parameters()), "gone.weight")}
    found = outline(model, names, names.get)
    assert found.kinds == {
        "a.up.weight": "linear", "up.weight": "linear", "up.bias": "of a Linear", "down.bias": "of a Linear",
        "down.weight": "tied to another tensor", "table.weight": "an embedding", "conv.weight": "of a Conv1d",
        "conv.bias": "of a Conv1d", "twin.bias": "of a Linear", "head.weight": "the output projection",
        "head.bias": "the output projection", "gone.weight": "not part of the model",
    }  # fmt: skip
    assert found.renamed == {"a.up.weight": "up.weight"}


def test_names_decide_where_no_model_is_known(folder):
    report, _ = convert(folder)
    assert report.decided_by == "names, as config.json tells of no model"
    reasons = {each.name: each.reason for each in report.kept}
    assert reasons["lm_head.weight"] == "the output projection, by its name"
    assert reasons["model.embed_tokens.weight"] == "an embedding, by its name"
    assert reasons["model.layers.0.input_layernorm.weight"] == "it is no matrix"


def test_matrices_that_may_have_inputs_first_are_kept_where_no_model_is_known(tmp_path):
    tensors = {**layers(count=1), "h.0.c_fc.weight": noise(32, 64), "h.0.c_fc.bias": noise(64)}
    tensors |= {"h.0.attn.c_proj.weight": noise(32, 32), "h.0.mlp.c_proj.weight": noise(64, 32)}
    tensors |= {"h.0.mlp.c_proj.bias": noise(32), "h.0.attn.c_proj.bias": noise(32), "h.0.conv.weight": noise(8, 4, 4)}
    report, _ = convert(write_folder(tmp_path / "model", tensors))
    reasons = {each.name: each.reason for each in report.kept}
    for name in ("h.0.c_fc", "h.0.attn.c_proj", "h.0.mlp.c_proj"):
        assert "inputs first" in reasons[f"{name}.weight"]
    assert reasons["h.0.conv.weight"] == "it has 3 dimensions"


# Refusals


def rewrite(path, change):
    """Change a file's header, and leave its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit(name, **fields):
    return lambda path: rewrite(path, lambda header: header[name].update(fields))


def retensor(changes):
    """Other tensors under these names; None takes one away."""

    def change(path):
        tensors = load_file(path)
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        save_file(tensors, path)

    return change


def reword(**changes):
    """Other words in quantization_config."""

    def change(path):
        config = json.loads((path.parent / "config.json").read_text())
        config["quantization_config"] |= changes
        (path.parent / "config.json").write_text(json.dumps(config))

    return change


O_PROJ = "model.layers.0.self_attn.o_proj"
# what is done to the file, what the message says
FAULTS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"truncated: expected \d+ bytes, and it has"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "longer than its header says"),
    "header cut": (lambda path: path.write_bytes(path.read_bytes()[:40]), "its header alone would take"),
    "no header": (lambda path: path.write_bytes(b""), "0 bytes"),
    "not JSON": (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"}{}{"), "its header cannot be read"),
    "a list": (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "no JSON object"),
    "dtype of another size": (edit(f"{O_PROJ}.weight_packed", dtype="F32"), r"which takes 2048 bytes, and has 512"),
    "dtype unknown": (edit(f"{O_PROJ}.weight_packed", dtype="F3"), "'F3'"),
    "dtype of the same size": (
        edit(f"{O_PROJ}.weight_packed", dtype="I8"), r"weight_packed: expected U8 .*, got I8 \[32, 16\]",
    ),
    "scales of another type": (
        edit(f"{O_PROJ}.weight_scale", dtype="F8_E5M2"),
        r"weight_scale: expected F8_E4M3 \[32, 2\] beside .*weight_packed U8 \[32, 16\], got F8_E5M2 \[32, 2\]",
    ),
    "scales of another shape": (
        edit(f"{O_PROJ}.weight_scale", shape=[16, 4]),
        r"weight_scale: expected F8_E4M3 \[32, 2\] .*, got F8_E4M3 \[16, 4\]",
    ),
    "codes of another shape": (
        edit(f"{O_PROJ}.weight_packed", shape=[64, 8]), r"weight_scale: expected F8_E4M3 \[64, 1\]",
    ),
    "an odd number of codes": (edit(f"{O_PROJ}.weight_packed", shape=[128, 4]), "whole blocks of 16 inputs"),
    "offsets that overlap": (edit(f"{O_PROJ}.weight_packed", data_offsets=[0, 512]), "starts at byte"),
    "a negative offset": (edit(f"{O_PROJ}.weight_packed", data_offsets=[-512, 0]), "-512"),
    "a global scale per row": (retensor({f"{O_PROJ}.weight_global_scale": torch.ones(32)}), r"expected F32 \[1\]"),
    "no scales": (retensor({f"{O_PROJ}.weight_scale": None}), "weight_scale is missing: expected F8_E4M3"),
    "no global scale": (retensor({f"{O_PROJ}.weight_global_scale": None}), "weight_global_scale is missing"),
    "no codes": (retensor({f"{O_PROJ}.weight_packed": None}), "scale is the scale of a weight that is not there"),
    "codes and the weight": (retensor({f"{O_PROJ}.weight": torch.ones(32, 32)}), "stands beside its own packed form"),
    "bitsandbytes": (
        retensor({f"{O_PROJ}.weight.quant_state.bitsandbytes__fp4": torch.zeros(9, dtype=torch.uint8)}),
        "bitsandbytes': its FP4 and NF4 have other values, and the high half of a byte first",
    ),
    "AWQ's smoothing": (retensor({f"{O_PROJ}.pre_quant_scale": torch.ones(32)}), "pre_quant_scale changes what its"),
    "another method": (reword(quant_method="gptq"), r"quant_method: expected apt_fp4, .*, got 'gptq'"),
    "bitsandbytes' method": (reword(quant_method="bitsandbytes"), "the high half of a byte first"),
    "gpt-oss's method": (reword(quant_method="mxfp4"), "gpt-oss's own layout"),
    "another format": (reword(config_groups={"g": {"format": "pack-quantized"}}), "expected nvfp4-pack-quantized or"),
    "eight bits": (
        reword(config_groups={"g": {"weights": {"num_bits": 8}}}), r"weights\.num_bits: expected 4, got 8",
    ),
    "other blocks": (
        reword(config_groups={"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}}),
        r"group_size: expected 16, got 32",
    ),
    "two formats": (
        reword(config_groups={"NVFP4A16": ["a"], "MXFP4A16": ["b"]}), "one format for all weights",
    ),
    "an unknown preset": (reword(config_groups={"W4A16": ["Linear"]}), "one of the presets NVFP4, "),
    "no groups": (reword(config_groups={}), "config_groups: expected an object of groups"),
    "not compressed": (reword(quantization_status="frozen"), "expected 'compressed', got 'frozen'"),
    "rotated": (reword(transform_config={"config_groups": {"u": {}}}), "transform_config: expected none"),
    "ours, but newer": (reword(quant_method="apt_fp4", format="nvfp4", layout=2), "layout: expected 1, got 2"),
    "ours, in other blocks": (reword(quant_method="apt_fp4", format="nvfp4", group_size=32), "group_size: expected 16"),
    "ours, the other half first": (reword(quant_method="apt_fp4", format="nvfp4", packing="high"), "packing: expected"),
    "ours, in another format": (reword(quant_method="apt_fp4", format="fp5"), "format: expected nvfp4 or mxfp4"),
    "the other format's name": (
        reword(quant_method="apt_fp4", format="mxfp4", group_size=32),
        r"weight_scale: expected U8 \[\d+, \d\] .*, got F8_E4M3",
    ),
    "ModelOpt in FP8": (reword(quant_method="modelopt", quant_algo="FP8"), "quant_algo: expected NVFP4 or"),
    "ModelOpt's words, other names": (reword(quant_method="modelopt", quant_algo="NVFP4"), "is the scale of a"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_before_any_data_is_read(tmp_path, monkeypatch, fault):
    convert(write_folder(tmp_path / "model", layers()))
    change, words = FAULTS[fault]
    change(tmp_path / "out" / "model.safetensors")
    monkeypatch.setattr(fp4_files, "read_tensor", lambda *_: pytest.fail("data was read"))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_fp4(tmp_path / "out")
    assert caught.value.remedy


def test_values_that_are_no_scales_are_refused(tmp_path):
    for number, (form, part, value) in enumerate(
        [("nvfp4", "global_scale", 0), ("nvfp4", "global_scale", 255), ("nvfp4", "scale", 127), ("mxfp4", "scale", 255)]
    ):
        folder = write_folder(tmp_path / str(number) / "model", layers())
        _, found = convert(folder, weights=form)
        entry = found.tensors.entries[f"{O_PROJ}.weight_{part}"]
        data = bytearray((folder.with_name("out") / "model.safetensors").read_bytes())
        data[entry.start : entry.start + 4] = bytes([value] * 4)
        (folder.with_name("out") / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=f"weight_{part}.*(above 0|no numbers)"):
            open_fp4(folder.with_name("out")).read_weight(f"{O_PROJ}.weight")


def test_a_folder_of_shards_is_checked_against_its_index(tmp_path):
    folder = write_folder(tmp_path / "model", layers(), shards=3)
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    shard = folder / "model-00002-of-00003.safetensors"
    cases = [
        (lambda: shard.rename(folder / "gone"), "lacks 1 of 3 files of weights: model-00002"),
        (lambda: save_file({"x": torch.ones(1)}, shard), r"tensors are not where .*index\.json says"),
        (lambda: index.write_text("[]"), "expected a JSON object"),
        (lambda: index.write_text('{"weight_map": {"a": "../b.safetensors"}}'), "outside its folder"),
        (lambda: index.write_text('{"weight_map": 3}'), "expected a 'weight_map'"),
    ]
    kept = shard.read_bytes()
    for change, words in cases:
        change()
        with pytest.raises(CheckpointError, match=words):
            open_folder(folder)
        shard.write_bytes(kept)
        index.write_text(whole)
    shard.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="stands in two files"):
        open_folder(folder)


def test_folders_without_safetensors_say_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can run code when it is read"):
        open_folder(tmp_path)


def test_an_unquantised_folder_is_not_taken_for_one(folder):
    with pytest.raises(CheckpointError, match=r"neither config\.json nor hf_quant_config\.json says"):
        open_fp4(folder)


def test_both_tables_of_block_sizes_agree():
    assert {name: form.block for name, form in FORMATS.items()} == fp4_storage.BLOCKS


# What happens to the process


_PEAK = r"""
import re, sys
from pathlib import Path
from apt_model.integrations.outline import outline
from apt_model.integrations.quantize_config import QuantizeConfig
from apt_model.integrations.quantize_files import quantize_folder
for name in ("small", "large"):
    quantize_folder(Path(sys.argv[1], name), Path(sys.argv[1], name + "-out"), QuantizeConfig(device="cpu"))
    # Not ru_maxrss, in which a new process starts with the peak of the one that started it.
    print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_grows_with_neither_the_model_nor_a_tensor(tmp_path):
    """What a model of 96 MiB in tensors of 16 and 64 MiB adds to the peak of a process that quantised 10 MiB."""
    write_folder(tmp_path / "small", {"a.weight": noise(1024, 1024).bfloat16(), "b": torch.zeros(2**21)})
    tensor = noise(8192, 1024).bfloat16()
    large = {f"{n}.weight": tensor.roll(n) for n in range(2)} | {"kept": torch.zeros(2**24)}
    write_folder(tmp_path / "large", large)
    # Freed memory goes back at once, so that the peak is of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    small, peak = map(int, done.stdout.split())
    assert peak - small < tensor.nbytes, f"{small / 2**20:.0f} MiB, then {peak / 2**20:.0f} MiB"
