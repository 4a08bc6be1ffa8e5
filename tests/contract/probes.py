"""What can be observed of a program that is given some options: small things to run, and what they return.

A probe takes options by name and returns something that can be compared (numbers, texts, names of files); the same
options give the same again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from fp4_folders import experts, layers, write_folder
from micro import figures, write_texts
from small_models import SHAPE, build, noise, tokens
from torch import nn

from apt_model.core.errors import AptError
from apt_model.core.policy import Policy, set_policy
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import CudaDevice
from apt_model.integrations.quantize_config import REPORT_FILE, QuantizeConfig
from apt_model.integrations.quantize_files import quantize_folder
from apt_model.modeling import apt_model as model_module
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.generation_config import GenerationConfig
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.ops.fp4 import FP8_ROWS
from apt_model.optimization import decision, four_bits
from apt_model.optimization.convert import quantize
from apt_model.optimization.fp4_config import FP4Config
from apt_model.optimization.product_speed import Speed
from apt_model.trainer.config import DataConfig, GradientConfig, TrainConfig
from apt_model.trainer.corpus import read_corpus
from apt_model.trainer.data import load_or_train_tokenizer, make_data
from apt_model.trainer.gradients import GradientReport, GradientTreatment
from apt_model.trainer.trainer import Trainer
from apt_model.trainer.watch import Step, Watch

Options = Mapping[str, Any]
Probe = Callable[[Options], Any]


def digest(*tensors: torch.Tensor) -> str:
    """Of the numbers, bit for bit."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().float().contiguous().numpy().tobytes())
    return f"{hashed.hexdigest()[:16]} of {[list(tensor.shape) for tensor in tensors[:1]]}"


def or_error(function: Callable[[], Any]) -> Any:
    """What it returns, or the name of our error that it raises: where a refusal is the effect."""
    try:
        return function()
    except AptError as error:
        return type(error).__name__


# --- files that probes read, made on first use and removed at the end of the process

_FOLDER = tempfile.TemporaryDirectory(prefix="apt-effects-")
ROOT = Path(_FOLDER.name)


@functools.cache
def texts() -> str:
    """A folder of text."""
    return str(write_texts(ROOT / "texts"))


@functools.cache
def library() -> str:
    """A folder like the standard library: modules with documented functions, test suites, and other kinds of text."""
    folder = ROOT / "library"
    (folder / "test").mkdir(parents=True)
    for number in range(12):
        code = (
            f'def add_{number}(x):\n    """Add {number} to what is given, and return it."""\n    return x + {number}\n'
        )
        (folder / f"module_{number}.py").write_text(code * 9)
        (folder / "test" / f"test_{number}.py").write_text(code)
        (folder / f"notes_{number}.txt").write_text(f"Notes on {number}.\n" * 20)
    return str(folder)


@functools.cache
def tokenizer_file() -> str:
    """A tokenizer that learned from something else."""
    path = ROOT / "tokenizer.json"
    Tokenizer.train(["zebras zigzag; zebras doze\n" * 99], 280).save(path)
    return str(path)


# --- the model


def _forward(model: APTModel) -> torch.Tensor:
    source, target = tokens(2, 9, seed=1, high=7), tokens(2, 10, seed=2)
    return model(source) if model.config.decoder_only else model(source, target)


def logits(options: Options) -> str:
    """What a model that is no longer new says of a batch; the ids 0 to 6 are its source."""
    with torch.no_grad():
        return digest(_forward(build(**options).eval()))


def logits_in_training(options: Options) -> str:
    """The same in training mode, from a known seed."""
    model = build(**options).train()
    torch.manual_seed(1)
    return digest(_forward(model))


def gradients(options: Options) -> str:
    """Gradients of the sum of squared logits."""
    model = build(**options)
    _forward(model).square().sum().backward()
    return digest(*(parameter.grad for parameter in model.parameters() if parameter.grad is not None))


def shapes(options: Options) -> Any:
    """Names and shapes of the parameters."""
    return [(name, *parameter.shape) for name, parameter in build(**options).named_parameters()]


def longest(options: Options) -> Any:
    """Whether a sequence of 10 positions is taken."""
    return or_error(lambda: logits(options))


def translation(options: Options) -> Any:
    """What is written from a source."""
    return or_error(lambda: build(**options).generate(tokens(1, 5), max_new_tokens=6).tolist())


def continuation(options: Options) -> Any:
    """What a prompt is continued with."""
    return build(**options).generate(tokens(1, 5), max_new_tokens=8, causal=True).tolist()


def second_token() -> int:
    """The second of them, as an id that can end it."""
    return continuation(SHAPE)[0][6]


# --- generation


@functools.cache
def _writer() -> APTModel:
    return build(decoder_only=True, eos_token_id=3, max_seq_len=96, tie_word_embeddings=True)


def written(options: Options) -> Any:
    """Continuations of three prompts; torch's global generator is in a known state."""
    torch.manual_seed(0)
    return _writer().generate(tokens(3, 4, low=4), GenerationConfig(**options)).tolist()


def positions_read(options: Options) -> list[int]:
    """How many positions the model reads for each new token."""
    read: list[int] = []
    hook = _writer().embedding.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    with hook:
        written(options)
    return read


# --- text


def _split(options: Options) -> Any:
    corpus = read_corpus(DataConfig(**options))
    return [[item.name for item in side] for side in (corpus.train, corpus.heldout)]


def names(options: Options) -> Any:
    """Names of the texts or pairs, on either side; the standard library is the folder `library`."""
    with mock.patch.object(sysconfig, "get_paths", return_value={"stdlib": library()}):
        return _split(options)


def batch(options: Options) -> Any:
    """The first batch."""
    config = DataConfig(**options)
    corpus = read_corpus(config)
    data = make_data(config, load_or_train_tokenizer(config, 300, corpus), corpus, 0)
    drawn = data.batch(0, 3)
    return digest(*drawn.inputs, drawn.labels), [list(ids.shape) for ids in (*drawn.inputs, drawn.labels)]


# --- a run


class Run(NamedTuple):
    """What a run leaves."""

    files: tuple[str, ...]
    rows: list[dict[str, float]]
    weights: str


RUNS: dict[str, Run] = {}


@contextlib.contextmanager
def _empty_folder() -> Any:
    """Work in a new folder, where the default `out` is free."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def _run(options: Options) -> Run:
    """The run of these options, in an empty folder; each is run once, as long as `RUNS` remembers it."""
    key = repr(sorted(options.items()))
    if key not in RUNS:
        with _empty_folder() as folder:
            trainer = Trainer(TrainConfig(**options))
            trainer.run()
            files = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir()))
            files += tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")))
            RUNS[key] = Run(files, figures(trainer.root), digest(*trainer.model.parameters()))
    return RUNS[key]


def weights(options: Options) -> str:
    """The weights that a run ends with."""
    return _run(options).weights


def rows(options: Options) -> Any:
    """The rows of metrics.jsonl."""
    return _run(options).rows


def files(options: Options) -> Any:
    """The folders and files that a run leaves, but for names that hold the time."""
    return [name for name in _run(options).files if "tfevents" not in name]


def run_without_extras(options: Options) -> Any:
    """The same where neither TensorBoard nor matplotlib is installed."""
    find = importlib.util.find_spec
    missing = ("tensorboard", "matplotlib")
    with mock.patch.object(importlib.util, "find_spec", lambda name, *_: None if name in missing else find(name)):
        RUNS.clear()
        return or_error(lambda: files(options))


def second_run(options: Options) -> Any:
    """What comes of a run in a folder that holds one."""
    with _empty_folder():
        first = Trainer(TrainConfig(**{**options, "resume": False}))
        first.run()
        return or_error(lambda: Trainer(TrainConfig(**options)).done)


def device(options: Options) -> Any:
    """Whether the device is there."""
    with _empty_folder():
        return or_error(lambda: bool(Trainer(TrainConfig(**options)).device))


def on_either_cpu(options: Options) -> Any:
    """The weights on a CPU that multiplies bf16 natively, and on one that does not."""
    found = []
    for native in (True, False):
        with mock.patch.object(CpuDevice, "supports_bf16", lambda _, native=native: native):
            RUNS.clear()
            found.append(weights(options))
    return found


def graphs_captured(options: Options) -> int:
    """Graphs that torch.compile makes of a step (with its backend that generates no code)."""
    counters, compile_module = torch._dynamo.utils.counters, nn.Module.compile
    torch._dynamo.reset()
    counters.clear()
    with (
        _empty_folder(),
        mock.patch.object(nn.Module, "compile", lambda module: compile_module(module, backend="eager")),
    ):
        Trainer(TrainConfig(**options)).train_step(0)
    return counters["stats"]["unique_graphs"]


def layers_computed(options: Options) -> int:
    """How often a step computes a decoder layer."""
    with _empty_folder():
        trainer = Trainer(TrainConfig(**options))
    return _count_layers(trainer.model, lambda: trainer.train_step(0))


def _count_layers(model: APTModel, work: Callable[[], Any]) -> int:
    calls: list[None] = []
    for layer in model.decoder_layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(None))
    work()
    return len(calls)


def steps_with_nan(options: Options) -> int:
    """Steps done until the run stops, when no gradient is finite."""
    with _empty_folder():
        trainer = Trainer(TrainConfig(**options))
        trainer.model.decoder_norm.weight.register_hook(lambda grad: grad * torch.nan)
        with contextlib.suppress(AptError):
            trainer.run()
        return trainer.done


def steps_uphill(options: Options) -> int:
    """Steps until the watch stops a run whose loss rises by one nat and stays there; 300 where it does not."""
    watch = Watch(TrainConfig(**options))
    report = GradientReport(torch.tensor(1.0), torch.tensor(0.0))
    for step in range(300):
        watch.add(Step(torch.tensor(1.0 if step == 0 else 2.0), report, tokens=1))
        try:
            watch.check()
        except AptError:
            return step
    return 300


# --- gradients


class _Pair(nn.Module):
    """A matrix and a vector that have gradients of uneven size."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.zeros(12, 8)), nn.Parameter(torch.zeros(5))

    def give_gradients(self, step: int) -> None:
        spike = 20.0 if step % 37 == 36 else 1.0
        self.matrix.grad = spike * noise(12, 8, seed=step) * torch.linspace(0.1, 3, 12)[:, None]
        self.vector.grad = noise(5, seed=step + 1000)


def treated(options: Options) -> str:
    """What 130 steps of treatment make of gradients: longer than any warm-up."""
    model = _Pair()
    treatment = GradientTreatment(model, GradientConfig(**options), seed=0, hidden=[("matrix", model.matrix)])
    seen = []
    for step in range(130):
        model.give_gradients(step)
        treatment(step)
        seen.append(torch.cat([model.matrix.grad.flatten(), model.vector.grad]))
    return digest(torch.stack(seen))


# --- quantised folders


def quantized(options: Options) -> Any:
    """The bytes of what a folder of layers becomes, by file, but for the report, which holds the time."""
    return _quantize("plain", layers(), options)


def quantized_experts(options: Options) -> Any:
    """The same of a folder with fused experts."""
    return _quantize("experts", {**layers(count=1), **experts()}, options)


def _quantize(name: str, tensors: dict[str, torch.Tensor], options: Options) -> Any:
    with _empty_folder() as folder:
        write_folder(folder / name, tensors)
        out = folder / "out"
        report = or_error(lambda: quantize_folder(folder / name, out, QuantizeConfig(**options)))
        if isinstance(report, str):
            return report
        return {path.name: path.read_bytes() for path in out.glob("*") if path.name != REPORT_FILE}


# --- a model's weights in 4 bits


def packed(options: Options) -> Any:
    """Names and shapes of a quantised model's parameters, and its logits."""
    model = quantize(build(decoder_only=True).eval(), FP4Config(**options))
    with torch.no_grad():
        return [(name, *held.shape) for name, held in model.named_parameters()], digest(_forward(model))


def packed_for_many_rows(options: Options) -> str:
    """What a quantised layer makes of many rows."""
    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(32, 16)), FP4Config(**options), report=lambda _: None)
    return _of_many_rows(model[0])


def _of_many_rows(layer: nn.Module) -> str:
    with torch.no_grad():
        return digest(layer(noise(FP8_ROWS, 32)))


def loaded(options: Options) -> Any:
    """The same of a transformers model that is quantised while it is loaded."""
    from hf_models import ids

    model = _loaded(options)
    with torch.no_grad():
        return [(name, *held.shape) for name, held in model.named_parameters()], digest(model(**ids(model)).logits)


def loaded_for_many_rows(options: Options) -> str:
    """What a layer of such a model makes of many rows."""
    return _of_many_rows(_loaded(options).model.layers[0].mlp.up_proj)


def _loaded(options: Options) -> Any:
    from hf_models import llama

    from apt_model.integrations import AptFP4Config

    torch.manual_seed(0)
    with _empty_folder() as folder:
        plain = llama()
        plain.save_pretrained(folder)
        return type(plain).from_pretrained(folder, quantization_config=AptFP4Config(**options))


# --- the policy


def under_policy(options: Options) -> Any:
    """What a new model does on machines with and without bf16 and memory; without options there is no policy."""
    return [_on_machine(options, machine) for machine in ((True, 2**40), (False, 2**40), (False, 0))]


def decided(options: Options) -> Any:
    """What is done with a frozen model on a GPU with room and Triton, where 4 bits are measured to be faster.

    What each choice then does is shown by tests/unit/test_vb_optimize.py, and on a GPU by tests/gpu.
    """
    if not options:
        return None
    model = build(decoder_only=True).eval().requires_grad_(False)
    gpu = CudaDevice()
    with (
        mock.patch.object(CudaDevice, "supports_bf16", return_value=True),
        mock.patch.object(CudaDevice, "free_memory", return_value=2**30),
        mock.patch.object(CpuDevice, "free_memory", return_value=2**30),
        mock.patch.object(four_bits, "speed_of", return_value=Speed((1.0,) * 3, (0.5,) * 3)),
        mock.patch.object(decision, "HAS_TRITON", new=True),
    ):
        found = decision.decide(model, Policy(**options), gpu)
    return dataclasses.replace(found, quantized=(), mode="", steps=()), [each.name for each in found.quantized]


def _on_machine(options: Options, machine: tuple[bool, int]) -> Any:
    """Type of the output, and layers computed in a step, where bf16 is native or not and so many bytes are free."""
    set_policy(Policy(**options) if options else None)
    try:
        with mock.patch.object(model_module, "_machine", return_value={"cpu": machine}):
            model = build(decoder_only=True)
    finally:
        set_policy(None)
    types: list[str] = []
    model.lm_head.register_forward_hook(lambda *call: types.append(str(call[-1].dtype)))
    return _count_layers(model, lambda: _forward(model).float().sum().backward()), types
