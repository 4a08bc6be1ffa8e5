"""How a finished run does on all of its held-out text, beside compressors and beside its plain twin."""

import dataclasses
import functools
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_model.core.errors import CheckpointError, ConfigError
from apt_model.core.system import get_device_manager
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.configuration import APTModelConfiguration
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer.baselines import compressed_bits_per_byte
from apt_model.trainer.checkpoint import STATE, verify, verify_model
from apt_model.trainer.corpus import Document, read_corpus
from apt_model.trainer.data import make_data
from apt_model.trainer.evaluation import autocast, evaluate, in_bf16
from apt_model.trainer.metrics import read_metrics
from apt_model.trainer.progress import Progress, Silent
from apt_model.trainer.runs import (
    CONFIG_FILE,
    SavedModel,
    changed_options,
    check_origin,
    find_model,
    resume_command,
    saved_config,
    step_folder,
    steps_saved,
)
from apt_model.trainer.trainer import Trainer, fingerprint

TWIN_FOLDER = "compare-plain"
MECHANISMS = {
    "use_left_spin": "left spin",
    "use_autopoietic": "autopoietic attention",
    "use_dbc_dac": "DBC-DAC",
}
_SIGN_OF_LIFE = 2.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model makes of the held-out text, and what its training took."""

    model: str
    step: int
    bits_per_byte: float
    nats_per_token: float
    tokens: int
    bytes: int
    seconds: float
    training_seconds: float | None
    """Time in steps, evaluations left out, from metrics.jsonl; None when that holds no row."""
    training_tokens_per_s: float | None


class Scorer:
    """Scores the model that `saved` names, and its twin, on the held-out text of its run.

    Raises:
        CheckpointError: the model belongs to no run, its files are damaged, or the text is not what it was.
        DataError, DeviceError: the text or the device is not there.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", progress: Progress | None = None) -> None:
        if saved.run is None or saved.step is None:
            check_origin(saved.folder)
            raise CheckpointError(
                f"{saved.folder} belongs to no run, so there is no held-out text to score",
                remedy="give a run (the --out of apt-model train) or one of its step folders",
            )
        self.saved, self.run, self.step = saved, saved.run, saved.step
        self.progress = progress or Silent()
        self.config = saved_config(self.run)
        self.manager = get_device_manager(device)
        verify_model(saved)
        self.progress.phase("reading text")
        corpus = read_corpus(self.config.data)
        self.progress.phase("encoding")
        self.data = make_data(self.config.data, Tokenizer.load(saved.tokenizer), corpus, self.config.seed)
        self._check_text(fingerprint(corpus, self.data))
        self.texts = [item.text if isinstance(item, Document) else item.target for item in corpus.heldout]

    def score(self, saved: SavedModel, *, batch_size: int | None = None, max_tokens: int | None = None) -> Score:
        """Score all held-out text, or `max_tokens` spread over it, in the run's own precision."""
        model = APTModel.from_pretrained(saved.folder, device=self.manager.device)
        model.apply_policy(None)  # the run's configuration, not the process's policy, decides
        bf16 = in_bf16(self.config.precision, self.manager)
        begin = time.monotonic()
        found = evaluate(
            model,
            self.data,
            batch_size=batch_size or self.config.batch_size,
            max_tokens=max_tokens,
            autocast=functools.partial(autocast, self.manager.device, bf16=bf16),
            on_batch=self._reporter(min(max_tokens or self.data.heldout_tokens, self.data.heldout_tokens)),
        )
        seconds = time.monotonic() - begin
        root, step = saved.run or self.run, saved.step or self.step
        training_seconds, pace = training_figures(root, step)
        return Score(
            model=str(saved.folder),
            step=step,
            bits_per_byte=found.bits_per_byte,
            nats_per_token=found.nats_per_token,
            tokens=found.tokens,
            bytes=found.bytes,
            seconds=seconds,
            training_seconds=training_seconds,
            training_tokens_per_s=pace,
        )

    def origin(self) -> SavedModel:
        """The step of the run that a derived model was made from; `CheckpointError` when it is gone or altered."""
        folder = step_folder(self.run, self.step)
        verify(folder)
        return find_model(folder)

    def compressors(self) -> dict[str, Any]:
        """Bits a byte of gzip and xz on all held-out texts (of pairs: the targets), and their size."""
        self.progress.phase("compressing the held-out text with gzip and xz")
        return {**compressed_bits_per_byte(self.texts), "bytes": sum(len(text.encode()) for text in self.texts)}

    def train_twin(self) -> SavedModel:
        """The twin of the finished run: the same in everything, without the three mechanisms.

        It is kept in compare-plain inside the run, goes on when it was interrupted, and is trained only once.

        Raises:
            ConfigError: the run is not finished, or is plain itself, or another run's twin is in the folder.
        """
        self._check_comparable()
        folder = self.run / TWIN_FOLDER
        plain = self.config.model.plain()
        wanted = dataclasses.replace(self.config, out=str(folder), resume=False, model=plain)
        if (folder / CONFIG_FILE).exists():
            if changed := changed_options(saved_config(folder), wanted):
                raise ConfigError(
                    f"{folder} is the twin of another run: {', '.join(changed)} differ",
                    remedy=f"rm -r {shlex.quote(str(folder))}",
                )
            if steps_saved(folder)[-1:] == [wanted.steps]:
                verify(step_folder(folder, wanted.steps))
                return find_model(folder)
            wanted = dataclasses.replace(wanted, resume=True)
        self.progress.note(f"training the plain twin in {folder}, {wanted.steps} steps")
        Trainer(wanted, progress=self.progress).run()
        return find_model(folder)

    def _check_comparable(self) -> None:
        if self.step != self.config.steps:
            newest = steps_saved(self.run)[-1]
            raise ConfigError(
                f"--compare: the model is from step {self.step} of {self.config.steps}, and a twin has them all",
                remedy=f"apt-model eval {shlex.quote(str(self.run))} --compare"
                if newest == self.config.steps
                else resume_command(self.run),
            )
        if len(mechanisms_off(self.config.model)) == len(MECHANISMS):
            raise ConfigError(
                f"--compare: the run in {self.run} is plain itself ({', '.join(MECHANISMS.values())} off)"
            )

    def _check_text(self, found: str) -> None:
        state = json.loads((self.saved.folder / STATE).read_text(encoding="utf-8"))
        if state["data"] != found:
            raise CheckpointError(
                f"the text under {self.config.data.source!r} is not what the run in {self.run} was trained on, so what "
                "is held out may not be what was",
                remedy="restore the text; the source 'stdlib' is the library of the Python that runs",
            )

    def _reporter(self, total: int) -> Callable[[int], None]:
        self.progress.phase(f"scoring {total:,} tokens")
        last = time.monotonic()

        def report(tokens: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _SIGN_OF_LIFE:
                last = time.monotonic()
                self.progress.phase(f"scored {tokens:,} of {total:,} tokens")

        return report


def mechanisms_off(model: APTModelConfiguration) -> list[str]:
    """Those of the three mechanisms that a model is trained without."""
    return [name for option, name in MECHANISMS.items() if not getattr(model, option)]


def training_figures(root: Path, step: int) -> tuple[float | None, float | None]:
    """Seconds in training steps up to `step` and tokens a second over them, from the run's own measurements."""
    rows = [row for row in read_metrics(root) if "tokens" in row and row["step"] <= step]
    seconds = sum(row["seconds"] for row in rows)
    return (seconds, sum(row["tokens"] for row in rows) / seconds) if rows else (None, None)
