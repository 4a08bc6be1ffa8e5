"""A run that a test can afford: a model of some twenty thousand parameters on twenty small files of text."""

import json
import random
from pathlib import Path

from apt_model.modeling.configuration import APTModelConfiguration
from apt_model.trainer.config import DataConfig, GradientConfig, OptimizerConfig, TrainConfig
from apt_model.trainer.metrics import read_metrics


def write_texts(folder: Path, *, files: int = 20, lines: int = 30) -> Path:
    """Text that is easy to learn something from; the same at every call."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(files):
        text = "".join(f"value_{draw.randrange(9)} = {draw.randrange(9)} + x\n" for _ in range(lines))
        (folder / f"text_{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


def write_pairs(path: Path, *, pairs: int = 120) -> Path:
    """Sources and targets of different lengths, one JSON object a line; the same at every call."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(pairs):
            word = "".join(draw.choices("abcd", k=draw.randint(2, 8)))
            pair = {"source": f"{number}: say {word}", "target": f"{word} is said"}
            file.write(json.dumps(pair) + "\n")
    return path


def model_config(**changes) -> APTModelConfiguration:
    """A decoder of two layers; an encoder-decoder with `decoder_only=False`."""
    options = {
        "vocab_size": 300, "d_model": 32, "num_encoder_layers": 1, "num_decoder_layers": 2, "num_heads": 2,
        "d_ff": 64, "max_seq_len": 64, "decoder_only": True,
    }  # fmt: skip
    return APTModelConfiguration(**{**options, **changes})


def train_config(out: Path, source: Path, *, model=None, data=None, optimizer=None, gradient=None, **changes):
    """Four steps on the CPU in fp32, without TensorBoard and curve, every step logged; nested options as mappings."""
    options = {
        "steps": 4, "batch_size": 4, "device": "cpu", "precision": "fp32", "tensorboard": "off", "plot": "off",
        "log_every": 1,
    }  # fmt: skip
    pairs = source.suffix == ".jsonl"
    return TrainConfig(
        out=str(out),
        model=model_config(**{"decoder_only": not pairs, **(model or {})}),
        data=DataConfig(
            **{"source": str(source), "task": "seq2seq" if pairs else "causal", "seq_len": 16, "target_len": 12}
            | (data or {})
        ),
        optimizer=OptimizerConfig(**{"lr": 1e-2, "warmup_steps": 2} | (optimizer or {})),
        gradient=GradientConfig(**gradient or {}),
        **{**options, **changes},
    )


def figures(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, without what is different in a run that was resumed, and on a busier machine."""
    timed = ("tokens", "seconds", "tokens_per_s", "memory_bytes")
    return [{name: value for name, value in row.items() if name not in timed} for row in read_metrics(out)]


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The bytes of the files of a checkpoint, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
