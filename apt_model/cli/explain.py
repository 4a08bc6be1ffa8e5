"""What a code means and what to do about it: of errors from their classes, of the doctor's findings from its table."""

import inspect
from collections.abc import Iterator
from typing import Any

from apt_model.cli.diagnosis.finding import CODES
from apt_model.core import errors

_ADVICE = {
    "APT-E000": "Run the command again with --debug: the traceback says where it came from. If it is no matter of "
    "memory or of the disk, the mistake is ours: please send it to us.",
    "APT-E001": "The message names the option, what it takes and what came. `apt-model COMMAND --help` lists all "
    "options with their choices and defaults; a run's own are in its train.json.",
    "APT-E002": "The message names the argument, what it takes and what came.",
    "APT-E003": "Shorten the text or --max-new-tokens, or train with a larger --model.max-seq-len.",
    "APT-E010": "The message names the file, and the line where there is one. --data.source takes 'stdlib', a text "
    "file, a folder of text (--data.suffixes says which files), or a .jsonl file.",
    "APT-E020": "Nothing was loaded. The message names the file that is missing or altered. An earlier checkpoint of "
    "the run, where there is one, is untouched: remove the refused folder and go on with --resume.",
    "APT-E030": "Take a lower --optimizer.lr or a longer --optimizer.warmup-steps. With --model.no-use-dbc-dac "
    "nothing clips gradients. metrics.jsonl holds the loss and the gradient's norm up to there.",
    "APT-E040": "`apt-model info` shows the device that is used. --device auto takes APT_DEVICE, or the best there is.",
    "APT-E050": "Install the package: the remedy is the command. Or leave the option that needs it at auto.",
    "APT-E060": "Nothing is lost up to the newest checkpoint: apt-model train --out OUT --resume goes on from there.",
    "APT-E070": "Raise the capacity to the figure in the message, or take smaller blocks, fewer slots or fewer bits.",
    "APT-E071": "What is on disk is not what was written, or could not be written: see that the disk has room and is "
    "sound. Weights that came from files of yours are still there; a store of tensors has lost the one named.",
    "APT-E080": "`apt-model cloud test` makes a round trip to each endpoint and says which hop failed. With "
    "fallback_local=True the layer computes here instead.",
    "APT-E081": "Raise the deadline, or see with `apt-model cloud test` how long a round trip takes.",
    "APT-E082": "The message says what the server said: a key that it does not take, weights that it does not hold "
    "(`apt-model cloud push`), or a body above its limit.",
    "APT-E083": "The server holds other weights than this process, or changed an answer. `apt-model cloud push` sends "
    "them again; until then compute locally.",
    "APT-E084": "What was sent is not the Open Inference Protocol v2 with its binary tensor extension, or too large: "
    "see what stands between client and server.",
    "APT-E085": "With fallback_local=True it is computed here in the meantime and counted. Where that happens "
    "often, the server or the network became slower, or this machine is busy.",
}


def explain(code: str) -> list[dict[str, Any]]:
    """Code, error, exit code, meaning and advice of `code` ('APT-E010', 'e010'); of all codes when it is empty."""
    known = {kind.code: _meaning(kind) for kind in _tree(errors.AptError)}
    known |= {name: _finding(name) for name in CODES}
    wanted = code.upper() if code.upper().startswith("APT-") or not code else f"APT-{code.upper()}"
    if wanted and wanted not in known:
        raise errors.ConfigError(f"there is no error code {code!r}", remedy=f"known codes: {', '.join(sorted(known))}")
    return [known[name] for name in sorted(known) if wanted in ("", name)]


def _tree(kind: type[errors.AptError]) -> Iterator[type[errors.AptError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def _finding(code: str) -> dict[str, Any]:
    meaning, advice = CODES[code]
    return {"code": code, "error": "finding of apt-model doctor", "exit_code": 1, "meaning": meaning, "advice": advice}


def _meaning(kind: type[errors.AptError]) -> dict[str, Any]:
    meaning = inspect.getdoc(kind) if kind is not errors.AptError else "Something that has no code of its own."
    return {
        "code": kind.code,
        "error": kind.__name__,
        "exit_code": kind.exit_code,
        "meaning": meaning,
        "advice": _ADVICE[kind.code],
    }
