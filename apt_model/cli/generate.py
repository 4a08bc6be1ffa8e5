"""`apt-model generate`: a prompt and its continuation, or a source and its target."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from apt_model.cli import output
from apt_model.cli.options import FLAT, GlobalOptions, parse
from apt_model.core.errors import CheckpointError, DataError, InputError
from apt_model.modeling.generation_config import GenerationConfig
from apt_model.trainer.runs import SavedModel, find_model, saved_config

if TYPE_CHECKING:
    from apt_model.modeling.apt_model import APTModel
    from apt_model.modeling.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Continue a text, or write the target of a source where the model was trained on pairs."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A run, one of its step folders, or what save_pretrained wrote with a tokenizer.json beside it."""
    prompt: str
    """The text to continue, or the source; '-' reads it from the standard input, less one line break at its end."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, hpu, npu, xpu, or one with a number, such as cuda:1."""
    generation: Annotated[GenerationConfig, FLAT] = field(default_factory=GenerationConfig)


def run(args: Sequence[str]) -> None:
    """Generate, and print the text alone."""
    options = parse(Options, args, "generate")
    saved = find_model(Path(options.path))
    prompt = _read_stdin() if options.prompt == "-" else options.prompt
    made = _generate(saved, prompt, options)
    if options.format == "json":
        output.write_json(made)
        return
    output.write_text(made["text"])
    if not options.quiet:
        sys.stdout.flush()
        note = f"{made['tokens']} tokens in {made['seconds']:.2f} s, {made['tokens_per_s']:,.0f} tokens/s\n"
        output.write(note, sys.stderr)


def _generate(saved: SavedModel, prompt: str, options: Options) -> dict[str, Any]:
    # After the options, which need no torch.
    import torch  # noqa: PLC0415

    from apt_model.core.system import get_device_manager  # noqa: PLC0415
    from apt_model.modeling.apt_model import APTModel  # noqa: PLC0415
    from apt_model.modeling.tokenizer import Tokenizer  # noqa: PLC0415
    from apt_model.trainer.checkpoint import verify_model  # noqa: PLC0415

    manager = get_device_manager(options.device)
    verify_model(saved)
    model = APTModel.from_pretrained(saved.folder, device=manager.device)
    tokenizer = Tokenizer.load(saved.tokenizer)
    _check_pair(model, tokenizer, saved)
    causal = _continues(model, saved)
    ids = _encode(prompt, model, tokenizer, causal=causal)
    given = torch.tensor([ids], device=manager.device)
    begin = time.monotonic()
    # All of it is text: where padding and the end share an id, the model would mask the end in front.
    mask = torch.ones_like(given, dtype=torch.bool)
    made = model.generate(given, options.generation, attention_mask=mask, causal=causal)[0].tolist()
    seconds = time.monotonic() - begin
    new = len(made) - (len(ids) if causal else 1)
    text = tokenizer.decode(made)
    return {"prompt": prompt, "text": text, "tokens": new, "seconds": seconds, "tokens_per_s": new / seconds}


def _encode(prompt: str, model: "APTModel", tokenizer: "Tokenizer", *, causal: bool) -> list[int]:
    ids = tokenizer.encode(prompt)
    if causal and model.config.eos_token_id is not None:
        ids = [model.config.eos_token_id, *ids]  # in training a document's first token follows the end of another
    if not ids:
        raise InputError("--prompt: expected text, got none")
    return ids


def _continues(model: "APTModel", saved: SavedModel) -> bool:
    """Whether the model continues its input: every decoder_only one, and an encoder-decoder trained to."""
    if model.config.decoder_only or saved.run is None:
        return model.config.decoder_only
    return saved_config(saved.run).data.task == "causal"


def _check_pair(model: "APTModel", tokenizer: "Tokenizer", saved: SavedModel) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{saved.tokenizer} has {tokenizer.vocab_size} ids and the model in {saved.folder} only "
            f"{model.config.vocab_size}: they do not belong together",
            remedy="put the tokenizer.json that the model was trained with in its place",
        )


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"the standard input is not {error.encoding} text (byte {error.start})") from error
