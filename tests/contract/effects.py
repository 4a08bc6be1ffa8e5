"""What every public option does, as something that can be observed.

`EFFECTS` is the table. A new option needs an entry: another value than its default, and a probe that runs something
small with the options it is given and returns what can be seen of it (numbers, texts, names of files). Both sides of
a comparison share the entry's `base`. A new class of options needs its place in `EFFECTS`; `BASE` makes it small.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
from micro import figures, model_config, write_texts
from small_models import SHAPE, build, noise, tokens
from torch import nn

from apt_model.core.errors import AptError
from apt_model.core.policy import Policy, set_policy
from apt_model.core.system.cpu import CpuDevice
from apt_model.modeling import apt_model as model_module
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration
from apt_model.modeling.generation_config import GenerationConfig
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer.config import DataConfig, GradientConfig, OptimizerConfig, TrainConfig
from apt_model.trainer.corpus import read_corpus
from apt_model.trainer.data import load_or_train_tokenizer, make_data
from apt_model.trainer.gradients import GradientReport, GradientTreatment
from apt_model.trainer.trainer import Trainer
from apt_model.trainer.watch import Step, Watch

Options = Mapping[str, Any]
Probe = Callable[[Options], Any]


class Effect(NamedTuple):
    """Another value of an option (a function makes one that needs files), and where its effect shows."""

    other: Any
    probe: Probe
    base: Options = MappingProxyType({})

    def value(self) -> Any:
        """The other value."""
        return self.other() if callable(self.other) else self.other


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


def run_with(group: str) -> Probe:
    """Weights of a run whose options of one group are given."""
    kinds = {"optimizer": OptimizerConfig, "model": APTModelConfiguration}

    def probe(options: Options) -> str:
        return weights({**BASE[TrainConfig], group: kinds[group](**options)})

    return probe


optimized, trained = run_with("optimizer"), run_with("model")


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


# --- the policy


def under_policy(options: Options) -> Any:
    """What a new model does on machines with and without bf16 and memory; without options there is no policy."""
    return [_on_machine(options, machine) for machine in ((True, 2**40), (False, 2**40), (False, 0))]


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


# --- the table

BASE: dict[type, dict[str, Any]] = {
    APTModelConfiguration: {**SHAPE},
    GenerationConfig: {"max_new_tokens": 12},
    TrainConfig: {
        "steps": 4, "batch_size": 4, "device": "cpu", "precision": "fp32", "tensorboard": "off", "plot": "off",
        "model": model_config(), "data": DataConfig(source=texts(), seq_len=16),
    },
    DataConfig: {"source": library()},
    OptimizerConfig: {"warmup_steps": 1},
    GradientConfig: {},
    Policy: {"mode": "balanced"},
}  # fmt: skip
TOO_LARGE = {
    APTModelConfiguration: set(SHAPE),
    TrainConfig: {"steps", "model", "data"},
}
"""Options whose default does not fit a test: the value in `BASE` stands in for it."""

EFFECTS: dict[type, dict[str, list[Effect]]] = {
    APTModelConfiguration: {
        "vocab_size": [Effect(41, logits)],
        "d_model": [Effect(64, logits)],
        "num_encoder_layers": [Effect(1, logits)],
        "num_decoder_layers": [Effect(1, logits)],
        "num_heads": [Effect(2, logits)],
        "d_ff": [Effect(96, logits)],
        "max_seq_len": [Effect(9, longest)],
        "decoder_only": [Effect(True, shapes)],
        "dropout": [Effect(0.1, logits_in_training)],
        "activation": [Effect("swiglu", logits)],
        "norm_position": [Effect("post", logits)],
        "norm_eps": [Effect(0.01, logits)],
        "rope_theta": [Effect(100.0, logits)],
        "tie_word_embeddings": [Effect(True, shapes), Effect(True, logits)],
        "pad_token_id": [Effect(5, logits)],
        "bos_token_id": [Effect(7, translation)],
        "eos_token_id": [Effect(second_token, continuation)],
        "use_autopoietic": [Effect(False, logits)],
        "sr_ratio": [Effect(2.0, shapes)],
        "autopoietic_alpha": [Effect(0.2, logits)],
        "use_left_spin": [Effect(False, logits)],
        "left_spin_mode": [Effect("trust", logits), Effect("guard", logits, {"left_spin_tau": 0.3})],
        "left_spin_alpha": [Effect(0.6, logits), Effect(0.6, logits, {"left_spin_mode": "trust"})],
        "left_spin_tau": [Effect(0.2, logits)],
        "left_spin_beta": [Effect(1.0, logits)],
        "left_spin_w1": [Effect(2.0, logits)],
        "left_spin_w2": [Effect(1.0, logits)],
        "left_spin_detach": [Effect(False, gradients)],
        "use_dbc_dac": [Effect(False, trained, model_config().to_dict())],
    },
    GenerationConfig: {
        "max_new_tokens": [Effect(5, written)],
        "do_sample": [Effect(True, written)],
        "temperature": [Effect(0.5, written, {"do_sample": True, "seed": 0})],
        "top_k": [Effect(2, written, {"do_sample": True, "seed": 0})],
        "top_p": [Effect(0.3, written, {"do_sample": True, "seed": 0})],
        "num_beams": [Effect(4, written)],
        "length_penalty": [Effect(0.0, written, {"num_beams": 4})],
        "seed": [Effect(1, written, {"do_sample": True})],
        "use_cache": [Effect(False, positions_read)],
    },
    TrainConfig: {
        "out": [Effect("elsewhere", files)],
        "resume": [Effect(True, second_run)],
        "steps": [Effect(3, rows)],
        "batch_size": [Effect(5, weights)],
        "grad_accumulation": [Effect(2, weights)],
        "seed": [Effect(1, weights)],
        "device": [Effect("cuda:63", device)],
        "precision": [Effect("fp32", on_either_cpu), Effect("bf16", on_either_cpu)],
        "compile": [Effect(True, graphs_captured)],
        "activation_checkpointing": [Effect(True, layers_computed)],
        "log_every": [Effect(1, rows)],
        "eval_every": [Effect(2, rows)],
        "eval_tokens": [Effect(20, rows)],
        "checkpoint_every": [Effect(2, files)],
        "keep_checkpoints": [Effect(1, files, {"checkpoint_every": 1})],
        "max_skipped": [Effect(2, steps_with_nan, {"steps": 12, "log_every": 1})],
        "divergence_margin": [Effect(0.5, steps_uphill)],
        "tensorboard": [Effect("off", files), Effect("on", run_without_extras)],
        "plot": [Effect("off", files), Effect("on", run_without_extras)],
        "model": [Effect(model_config(d_ff=32), weights)],
        "data": [Effect(DataConfig(source=texts(), seq_len=15), weights)],
        "optimizer": [Effect(OptimizerConfig(lr=0.01), weights)],
        "gradient": [Effect(GradientConfig(max_norm=0.1), weights)],
    },
    DataConfig: {
        "source": [Effect(texts, names)],
        "task": [Effect("seq2seq", names)],
        "include_tests": [Effect(True, names, {"source": "stdlib"})],
        "suffixes": [Effect(".txt", names)],
        "holdout": [Effect(0.5, names)],
        "tokenizer": [Effect(tokenizer_file, batch)],
        "seq_len": [Effect(16, batch)],
        "target_len": [Effect(8, batch, {"task": "seq2seq"})],
    },
    OptimizerConfig: {
        "lr": [Effect(0.01, optimized)],
        "min_lr_ratio": [Effect(0.5, optimized)],
        "warmup_steps": [Effect(3, optimized)],
        "weight_decay": [Effect(0.2, optimized)],
        "beta1": [Effect(0.8, optimized)],
        "beta2": [Effect(0.9, optimized)],
        "eps": [Effect(1e-6, optimized)],
    },
    GradientConfig: {
        "clipping": [Effect("adagc", treated), Effect("zclip", treated)],
        "max_norm": [Effect(2.0, treated)],
        "rank_ratio": [Effect(0.25, treated)],
        "row_balance": [Effect(True, treated, {"rank_ratio": 0.25})],
        "error_feedback": [Effect(False, treated, {"rank_ratio": 0.25})],
        "refresh_steps": [Effect(50, treated, {"rank_ratio": 0.25})],
    },
    Policy: {
        "mode": [Effect("balanced", under_policy)],
        "precision": [Effect("fp32", under_policy), Effect("bf16", under_policy)],
        "activation_checkpointing": [Effect("on", under_policy), Effect("off", under_policy)],
    },
}
