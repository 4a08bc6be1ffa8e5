"""Every error this package raises on purpose, in one tree.

    AptError
    |-- ConfigError (ValueError)         APT-E001  an option has a value that cannot be met
    |-- InputError (ValueError)          APT-E002  a tensor or an argument is not what the call takes
    |   `-- SequenceLengthError          APT-E003  more positions than the model was built for
    |-- DataError (ValueError)           APT-E010  text that cannot be read, or holds nothing
    |-- CheckpointError (RuntimeError)   APT-E020  files of a model or a run that cannot be trusted
    |-- DivergenceError (RuntimeError)   APT-E030  training left the finite numbers or went uphill for good
    |-- DeviceError (RuntimeError)       APT-E040  a device that was asked for is not there
    |-- MissingExtraError (ImportError)  APT-E050  an optional package is needed and not installed
    |-- InterruptedRun                   APT-E060  stopped from outside; the work so far is saved
    |-- CapacityError (RuntimeError)     APT-E070  something does not fit into a level of memory
    |-- StorageError (RuntimeError)      APT-E071  bytes on disk cannot be written, read or trusted
    `-- CloudError (RuntimeError)        APT-E080  an accelerator elsewhere could not compute
        |-- DeadlineError                APT-E081  it did not answer in time
        |-- RefusedError                 APT-E082  it answered, and will answer the same again: a key, a model, a limit
        |-- IntegrityError               APT-E083  it answered numbers that are not the weights' product
        |-- WireError                    APT-E084  bytes that are not the protocol's, or beyond its limits
        `-- LateError                    APT-E085  its answer is late, and may still come

The message says what was expected and what came; `state` says what became of the work; `remedy` is what to do, as a
command or an edit that works when pasted. Foreign exceptions are mapped where they enter, with `raise ... from`.
"""

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar


class AptError(Exception):
    """Base of all. `code` is stable and documented; `exit_code` is what the command line leaves with."""

    code: ClassVar[str] = "APT-E000"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, state: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.state = state
        self.remedy = remedy

    def __str__(self) -> str:
        return "\n".join(part for part in (self.message, self.state, self.remedy) if part)


class ConfigError(AptError, ValueError):
    """An option has an unknown name or a value that cannot be met; the message names the option and what it takes."""

    code = "APT-E001"
    exit_code = 2


class InputError(AptError, ValueError):
    """A tensor's shape, type or value, or an argument, is not what the call takes."""

    code = "APT-E002"
    exit_code = 2


class SequenceLengthError(InputError):
    """A sequence is longer than `max_seq_len`, the number of positions that the model was built for."""

    code = "APT-E003"


class DataError(AptError, ValueError):
    """A file of text is missing, unreadable, empty or not in the expected form; the message names the file."""

    code = "APT-E010"
    exit_code = 2


class CheckpointError(AptError, RuntimeError):
    """A model's or a run's files are truncated, altered, incomplete or belong to something else."""

    code = "APT-E020"
    exit_code = 3


class DivergenceError(AptError, RuntimeError):
    """Training stopped because the loss or the gradients were not finite, or the loss rose and stayed up."""

    code = "APT-E030"
    exit_code = 4


class DeviceError(AptError, RuntimeError):
    """The device asked for is not usable; the message names the first check that failed."""

    code = "APT-E040"
    exit_code = 5


class MissingExtraError(AptError, ImportError):
    """A feature needs a package that is not installed; the remedy is the install command."""

    code = "APT-E050"
    exit_code = 6

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed",
            remedy=f"pip install 'apt-transformer[{extra}]'",
        )


class InterruptedRun(AptError):  # noqa: N818 - an interruption is not a fault
    """The run was told to stop, saved its state and left; the remedy is the command that goes on."""

    code = "APT-E060"
    exit_code = 130


class CapacityError(AptError, RuntimeError):
    """A tensor or a model does not fit the capacities given; the message says what is the least that would do."""

    code = "APT-E070"
    exit_code = 7


class StorageError(AptError, RuntimeError):
    """A store's file cannot be written, is truncated, altered or gone; the message names the tensor and the place."""

    code = "APT-E071"
    exit_code = 3


class CloudError(AptError, RuntimeError):
    """An accelerator elsewhere could not compute; the message names the endpoint, never a key."""

    code = "APT-E080"
    exit_code = 8


class DeadlineError(CloudError):
    """A forward's deadline passed, all attempts included, before an answer was there."""

    code = "APT-E081"


class RefusedError(CloudError):
    """A server answered that it will not do this, and asking again will not help: the message says what it said."""

    code = "APT-E082"


class IntegrityError(CloudError):
    """A server's answer failed the check against the local weights; it was not used."""

    code = "APT-E083"


class WireError(CloudError):
    """A message is not one of the Open Inference Protocol, or is beyond the limits set for it."""

    code = "APT-E084"


class LateError(CloudError):
    """No answer yet, and it may still come: what can be computed here is, in the meantime.

    Exchanges are open. `end` must be called, after what their answers were wanted for.

    Args:
        message: whose answer.
        rests: each gives the answer where it came in the meantime, or closes its exchange and raises `CloudError`.
    """

    code = "APT-E085"

    def __init__(self, message: str, *rests: Callable[[], Any]) -> None:
        super().__init__(message)
        self.rests = rests

    def end(self) -> None:
        """Read or close what is open. An answer that came is of no use to the caller any more."""
        rests, self.rests = self.rests, ()
        for rest in rests:
            with contextlib.suppress(CloudError):
                rest()
