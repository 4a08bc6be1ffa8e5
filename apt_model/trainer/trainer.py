"""The training loop.

Step n is a function of the weights, the optimizer's state, the seed and n: the batch and every dropout mask follow
from (seed, n). So a checkpoint holds no random state, and a resumed run repeats the uninterrupted one.
"""

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from apt_model.core.errors import CheckpointError, ConfigError, InterruptedRun, MissingExtraError
from apt_model.core.files import clear_partials, write_text
from apt_model.core.system.manager import get_device_manager
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer.checkpoint import load_checkpoint, save_checkpoint
from apt_model.trainer.config import TrainConfig
from apt_model.trainer.corpus import Corpus, read_corpus
from apt_model.trainer.data import TokenData, load_or_train_tokenizer, make_data
from apt_model.trainer.evaluation import Evaluation, autocast, count_targets, evaluate, in_bf16, to_device, token_nats
from apt_model.trainer.gradients import GradientTreatment, untreated
from apt_model.trainer.metrics import can_write_events, open_sinks
from apt_model.trainer.optimizer import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from apt_model.trainer.plot import can_plot, draw_curve
from apt_model.trainer.progress import Progress, Silent
from apt_model.trainer.runs import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    changed_options,
    resume_command,
    saved_config,
    step_folder,
    steps_saved,
)
from apt_model.trainer.watch import Step, Watch


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished run came to."""

    out: str
    steps: int
    parameters: int
    loss: float
    bits_per_byte: float
    tokens_per_s: float
    peak_memory_bytes: int
    seconds: float
    skipped_steps: int
    checkpoint: str
    curve: str | None


class Trainer:
    """One run: `Trainer(config).run()`. Writes only below `config.out`.

    Raises:
        ConfigError: `out` holds a run and `resume` is off, or `resume` is on with options that change the arithmetic.
        DataError, DeviceError, CheckpointError: the text, the device or the checkpoint to go on from is unusable.
        MissingExtraError: `tensorboard` or `plot` is on, and its package is not installed.
    """

    def __init__(self, config: TrainConfig, *, progress: Progress | None = None) -> None:
        self.config, self.root = config, Path(config.out)
        self.progress = progress or Silent()
        self._check_folder()
        self._check_extras()
        self.manager = get_device_manager(config.device)
        self.device = self.manager.device
        self.bf16 = in_bf16(config.precision, self.manager)
        self.data = self._load_data()
        self.model = self._build_model()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.treatment = (
            GradientTreatment(self.model, config.gradient, seed=config.seed, hidden=self.model.hidden_matrices())
            if config.model.use_dbc_dac
            else None
        )
        self.done = 0
        self.watch = Watch(config)
        if config.resume:
            self._restore()
        self._stop_signal: int | None = None

    def _check_folder(self) -> None:
        holds_run = (self.root / CONFIG_FILE).exists() or bool(steps_saved(self.root))
        if self.config.resume:
            if changed := changed_options(saved_config(self.root), self.config):
                raise ConfigError(
                    f"resume: these options differ from the run in {self.root}: {', '.join(changed)}",
                    remedy=f"resume with the run's own options (they are in {self.root / CONFIG_FILE}), "
                    "or start a new run in another folder",
                )
        elif holds_run:
            raise ConfigError(
                f"{self.root} already holds a run",
                remedy=f"go on with it: {resume_command(self.root)}; or give another --out",
            )

    def _check_extras(self) -> None:
        # Before training: the curve would be missed only after the last step.
        if self.config.tensorboard == "on" and not can_write_events():
            raise MissingExtraError("--tensorboard on", "tensorboard", "tensorboard")
        if self.config.plot == "on" and not can_plot():
            raise MissingExtraError("--plot on", "matplotlib", "plot")

    def _load_data(self) -> TokenData:
        self.progress.phase("reading text")
        corpus = read_corpus(self.config.data)
        kept = self.root / TOKENIZER_FILE
        if self.config.resume and kept.exists():
            tokenizer = Tokenizer.load(kept)
        else:
            self.progress.phase("training the tokenizer")
            tokenizer = load_or_train_tokenizer(self.config.data, self.config.model.vocab_size, corpus)
        self.progress.phase("encoding")
        data = make_data(self.config.data, tokenizer, corpus, self.config.seed)
        self._fingerprint = fingerprint(corpus, data)
        return data

    def _build_model(self) -> APTModel:
        tokenizer = self.data.tokenizer
        ids = {
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }
        self.config = dataclasses.replace(self.config, model=self.config.model.replace(**ids))
        torch.manual_seed(self.config.seed)
        model = APTModel(self.config.model)
        model.apply_policy(None)  # this configuration, not the process's policy, decides
        model.activation_checkpointing = self.config.activation_checkpointing
        model.to(self.device)
        if self.config.compile:
            model.compile()
        return model

    def run(self) -> RunResult:
        """Train to the last step, evaluate, save, draw.

        Raises:
            DivergenceError: the loss left the finite numbers or stayed up; the newest checkpoint is from before.
            InterruptedRun: SIGINT or SIGTERM came; the step in hand was finished and saved.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        clear_partials(self.root)
        if not self.config.resume:
            self.data.tokenizer.save(self.root / TOKENIZER_FILE)
        effective = dataclasses.asdict(dataclasses.replace(self.config, resume=False))
        write_text(self.root / CONFIG_FILE, json.dumps(effective, indent=2) + "\n")
        sinks = open_sinks(self.root, self.config.tensorboard, from_step=self.done)
        self.progress.start(self.config.steps, self.done)
        try:
            with self._signals():
                return self._train(sinks)
        finally:
            for sink in sinks:
                sink.close()

    def _train(self, sinks: list[Any]) -> RunResult:
        config, begin = self.config, time.monotonic()
        self.manager.reset_peak_memory()
        first, row, last, tokens = self.done, None, None, 0
        for step in range(self.done, config.steps):
            self.watch.add(taken := self.train_step(step))
            tokens += taken.tokens
            self.done = step + 1
            ends = self.done == config.steps
            stop = self._stop_signal  # read once: it may come between any two lines
            row = None
            if self.done % config.log_every == 0 or ends or stop:
                row = last = self._log_row(step, sinks)
            self.progress.step(self.done, row)
            if ends or (config.eval_every and self.done % config.eval_every == 0):
                heldout = self._evaluate(sinks)
            if ends or stop or self.done % config.checkpoint_every == 0:
                self.save()
            if stop and not ends:
                raise InterruptedRun(
                    f"stopped by {signal.Signals(stop).name} after step {self.done} of {config.steps}",
                    state=f"saved: {step_folder(self.root, self.done)}",
                    remedy=f"to go on: {resume_command(self.root)}",
                )
        if first == config.steps:
            heldout = self._evaluate([])
        seconds = time.monotonic() - begin
        return self._result(last, heldout, tokens, seconds)

    def train_step(self, step: int) -> Step:
        """Take optimizer step `step`, from 0."""
        config = self.config
        self.manager.manual_seed(_mix(config.seed, step))
        batch = self.data.batch(step, config.batch_size * config.grad_accumulation)
        targets = count_targets(batch)
        total = torch.zeros((), device=self.device)
        self.model.train()
        for first in range(0, len(batch.labels), config.batch_size):
            rows = slice(first, first + config.batch_size)
            part = to_device(type(batch)(tuple(ids[rows] for ids in batch.inputs), batch.labels[rows]), self.device)
            with self.autocast():
                loss = token_nats(self.model(*part.inputs), part.labels) / targets
            loss.backward()
            total += loss.detach()
        report = untreated(self.model) if self.treatment is None else self.treatment(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.steps)
        self.optimizer.found_inf = report.found_inf  # type: ignore[attr-defined] # fused AdamW skips such a step itself
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(total, report, sum(ids.numel() for ids in batch.inputs))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the run: bf16 autocast, or nothing."""
        return autocast(self.device, bf16=self.bf16)

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far."""
        self.watch.check()
        tensors = optimizer_tensors(self.model, self.optimizer)
        if self.treatment is not None:
            tensors |= {f"treatment.{name}": tensor for name, tensor in self.treatment.state_dict().items()}
        state = {"data": self._fingerprint, "watch": self.watch.state()}
        return save_checkpoint(self.root, self.done, self.model, tensors, state, keep=self.config.keep_checkpoints)

    def _restore(self) -> None:
        saved = steps_saved(self.root)
        if not saved:
            return  # killed before its first checkpoint: step 0 follows from the seed
        found = load_checkpoint(self.root, saved[-1])
        if found.state["data"] != self._fingerprint:
            raise CheckpointError(
                f"the text under {self.config.data.source!r} is not what the run in {self.root} was trained on",
                remedy="restore the text, or start a new run in another folder",
            )
        model = APTModel.from_pretrained(step_folder(self.root, found.step))
        if model.config != self.config.model:
            raise CheckpointError(
                f"{step_folder(self.root, found.step)} holds another model than {self.root / CONFIG_FILE} describes",
                remedy="put back the folder that this run wrote",
            )
        self.model.load_state_dict(model.state_dict())
        load_optimizer_tensors(self.model, self.optimizer, found.tensors)
        if self.treatment is not None:
            prefix = "treatment."
            self.treatment.load_state_dict(
                {name[len(prefix) :]: value for name, value in found.tensors.items() if name.startswith(prefix)}
            )
        self.watch.restore(found.state["watch"])
        self.done = found.step

    def _log_row(self, step: int, sinks: list[Any]) -> dict[str, Any]:
        row = {
            "step": self.done,
            **self.watch.row(),
            "lr": learning_rate(self.config.optimizer, step, self.config.steps),
        }
        row["memory_bytes"] = self.manager.memory_allocated()
        for sink in sinks:
            sink.write(row)
        self.watch.check()
        return row

    def _evaluate(self, sinks: list[Any]) -> Evaluation:
        self.progress.phase("evaluating on held-out text")
        begin = time.monotonic()
        heldout = evaluate(
            self.model,
            self.data,
            batch_size=self.config.batch_size,
            max_tokens=self.config.eval_tokens,
            autocast=self.autocast,
        )
        for sink in sinks:
            sink.write({"step": self.done, "bits_per_byte": heldout.bits_per_byte})
        self.progress.note(f"step {self.done}  held-out {heldout.bits_per_byte:.4f} bits/byte")
        self.watch.leave_out(time.monotonic() - begin)
        return heldout

    def _result(self, last: dict[str, Any] | None, heldout: Evaluation, tokens: int, seconds: float) -> RunResult:
        if self.config.plot == "on" or (self.config.plot == "auto" and can_plot()):
            curve: str | None = str(draw_curve(self.root))
        else:
            curve = None
        return RunResult(
            out=str(self.root),
            steps=self.config.steps,
            parameters=self.model.num_parameters(),
            loss=float("nan") if last is None else last["loss"],
            bits_per_byte=heldout.bits_per_byte,
            tokens_per_s=tokens / seconds,
            peak_memory_bytes=self.manager.peak_memory(),
            seconds=seconds,
            skipped_steps=self.watch.skipped,
            checkpoint=str(step_folder(self.root, self.config.steps)),
            curve=curve,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While training, SIGINT and SIGTERM ask for a stop at the next step's end; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: object) -> None:
            if self._stop_signal:
                raise KeyboardInterrupt
            self._stop_signal = number
            self.progress.note("stopping after this step; once more to stop at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fingerprint(corpus: Corpus[Any], data: TokenData) -> str:
    """Of every text, held out or not, and of a batch of ids, which says whether the tokenizer is the same."""
    digest = hashlib.sha256()
    for item in (*corpus.train, *corpus.heldout):
        for text in dataclasses.astuple(item):
            encoded = text.encode("utf-8", "surrogateescape")
            digest.update(b"%d:" % len(encoded) + encoded)
    batch = data.batch(0, 64)
    for ids in (*batch.inputs, batch.labels):
        digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _mix(seed: int, step: int) -> int:
    """A seed of its own for every step."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
