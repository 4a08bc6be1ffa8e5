"""A block's forward elsewhere or here: one decision, one count, one fallback, for every layer that offloads."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from apt_model.cloud.backend import CloudBackend, OIPBackend, rows_that_fit
from apt_model.cloud.client import Tally
from apt_model.cloud.deadline import Deadline
from apt_model.cloud.dialect import Dialect
from apt_model.cloud.int8g64 import GROUP, WIRES, pack, unpack
from apt_model.cloud.stats import Stats
from apt_model.cloud.tensors import ACTIVATIONS, Weights
from apt_model.core.errors import CloudError, ConfigError, InputError, LateError, RefusedError

LOG = logging.getLogger(__name__)
Wire = Literal["exact", "int8g64"]
_PATIENCE = 0.25  # seconds a forward waits for a busy server where it can be computed here
_LATE = 0.005  # seconds that an answer has at least, before it is computed here in the meantime,
_LATE_SHARE = 4  # and one of so many parts of the time that computing here takes: it cannot be stopped once it began
_MEASURED_AFTER = 4  # forwards elsewhere, before one is repeated here to compare the times
_LOSES = 1.5
_SLOWEST = 1e6  # bytes a second that weights travel at, at least, before giving up
_DEPLOY = (
    "deploy a server that holds the weights (apt-model serve, in a ModelArts, RunPod or SaladCloud container or on a "
    "machine of yours) and give its address; or fallback_local=True"
)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a block makes of rows: the tensor's name, and its shape behind the first dimension."""

    name: str
    rest: tuple[int, ...]


class Offload:
    """Where a layer's blocks run.

    Args:
        backend: the accelerator elsewhere; None computes here.
        who: the layer, for messages.
        fallback_local: compute here where it cannot be done there, or is late; otherwise the error is raised.
        wire: "exact", or "int8g64" for half the bytes or fewer, lossy.
        deadline_s: of a forward, all attempts included; pushing weights is not part of it.
        push: give the server the weights it does not hold.

    Raises:
        ConfigError: a value that cannot be met, or nothing that could compute.
    """

    def __init__(
        self,
        backend: CloudBackend | None,
        *,
        who: str,
        fallback_local: bool,
        wire: Wire,
        deadline_s: float,
        push: bool,
    ) -> None:
        if wire not in WIRES:
            raise ConfigError(f"{who}: expected wire to be one of {', '.join(WIRES)}, got {wire!r}")
        if not deadline_s > 0:
            raise ConfigError(f"{who}: expected deadline_s above 0, got {deadline_s!r}")
        if backend is not None and not isinstance(backend, CloudBackend):
            raise ConfigError(
                f"{who}: expected a backend of get_cloud_npu_manager(), got {type(backend).__name__}",
                remedy='cloud_backend=get_cloud_npu_manager().get_backend("huawei")',
            )
        self.backend = backend
        self.who = who
        self.fallback_local = fallback_local
        self.wire = wire
        self.deadline_s = deadline_s
        self.push = push
        self.stats = Stats()
        self._is_compared, self._remote_calls = False, 0
        self.tensors = backend if isinstance(backend, OIPBackend) else None
        if self.tensors is None:
            self._no_tensors()

    def forward(
        self, rows: int, why_local: str | None, elsewhere: Callable[[Tally], Tensor], here: Callable[[], Tensor]
    ) -> Tensor:
        """One forward: `elsewhere`, or `here` where there is a reason, or where that fails and may."""
        with self.stats.forward() as count:
            reason = "no server for tensors" if self.tensors is None else why_local
            late = None
            if reason is None:
                try:
                    started = time.perf_counter()
                    found = elsewhere(count.tally)
                    self.stats.took("cloud", time.perf_counter() - started - count.tally.aside, rows)
                except LateError as error:
                    late = error
                    self.stats.failed(error)
                except (CloudError, InputError) as error:
                    self._fell_back(error)
                else:
                    count.where = "cloud"
                    self._compare(rows, here)
                    return found
            else:
                self.stats.because(reason)
            started = time.perf_counter()
            with _ended(late):
                found = here()
                self.stats.took("local", time.perf_counter() - started, rows)
            count.where = "local"
            return found

    def give(self, weights: Callable[[], Weights]) -> int:
        """Give the server weights now; bytes that were sent, 0 where it holds them and where there is none."""
        if self.tensors is None:
            return 0
        sent = self.tensors.push(weights())
        self.stats.add("bytes_pushed", sent)
        return sent

    def read(self) -> dict[str, Any]:
        """What became of the forwards, and in what state the endpoints are."""
        endpoints = self.tensors.client.endpoints if self.tensors else ()
        return {**self.stats.read(), "breaker": [each.breaker.state for each in endpoints]}

    def backward(self, elsewhere: Callable[[Tally], Tensor], here: Callable[[], Tensor]) -> Tensor:
        """A gradient to the input, there or here."""
        tally, late = Tally(), None
        try:
            try:
                found = elsewhere(tally)
            except (CloudError, InputError) as error:
                if isinstance(error, CloudError):
                    self.stats.failed(error)
                late = error if isinstance(error, LateError) else None
                if not self.fallback_local:
                    raise
            else:
                self.stats.add("backward_cloud")
                return found
            self.stats.add("backward_local")
            with _ended(late):
                return here()
        finally:
            for name in ("sent", "received"):
                self.stats.add(f"bytes_{name}", getattr(tally, name))
            self.stats.add("retries", tally.retries)

    def ask(
        self, weights: Weights, inputs: Mapping[str, Tensor], output: Output, tally: Tally, *, suffix: str = ""
    ) -> Tensor:
        """The block's output for all rows, in as many requests as the body limits ask for; where the inputs are.

        Args:
            weights: the block's.
            inputs: by name; the first one says the type and the rows of the answer.
            output: what comes back.
            tally: what is added to.
            suffix: ".bwd" for the backward.
        """
        backend = self.tensors
        assert backend is not None
        self._give(weights, tally)
        lead, deadline = next(iter(inputs.values())), Deadline(self.deadline_s)
        dialect = backend.dialect(deadline, tally=tally, patience=self._patience)
        request_row = sum(self._row_bytes(each.shape[1:], each.dtype, dialect) for each in inputs.values())
        answer_row = self._row_bytes(output.rest, lead.dtype, dialect)
        step = rows_that_fit(backend.limits(), request_row, answer_row, self.who)
        meanwhile = self._meanwhile(lead.numel() // max(lead.shape[-1], 1))
        call = _Call(backend, weights, suffix, output, deadline, os.urandom(16).hex(), tally, meanwhile)
        if step >= len(lead):
            return self._ask_chunk(call, inputs)
        chunks = []
        for number, start in enumerate(range(0, len(lead), step)):
            # Another request, so another id: a server may answer a known id from what it remembers.
            part = call._replace(identity=f"{call.identity}.{number}")
            chunks.append(self._ask_chunk(part, {name: each[start : start + step] for name, each in inputs.items()}))
        return torch.cat(chunks)

    def _ask_chunk(self, call: "_Call", inputs: Mapping[str, Tensor]) -> Tensor:
        lead, output = next(iter(inputs.values())), call.output
        shape = (len(lead), *output.rest)
        if self.wire == "exact":
            return self._infer(call, inputs, {output.name: (lead.dtype, shape)})[output.name].to(lead.device)
        sent: dict[str, Tensor] = {}
        for name, each in inputs.items():
            if each.is_floating_point():
                sent[f"{name}_q"], sent[f"{name}_scale"] = pack(each.detach().cpu())
            else:
                sent[name] = each
        groups = -(-shape[-1] // GROUP)
        wanted = {
            f"{output.name}_q": (torch.int8, shape),
            f"{output.name}_scale": (torch.float16, (*shape[:-1], groups)),
        }
        found = self._infer(call, sent, wanted)
        values = unpack(found[f"{output.name}_q"], found[f"{output.name}_scale"], shape[-1], lead.dtype)
        return values.to(lead.device)

    def _infer(
        self, call: "_Call", sent: Mapping[str, Tensor], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> dict[str, Tensor]:
        def ask() -> dict[str, Tensor]:
            return call.backend.infer(
                call.weights, sent, wanted, deadline=call.deadline, suffix=call.suffix, identity=call.identity,
                tally=call.tally, parameters={} if self.wire == "exact" else {"wire": self.wire},
                patience=self._patience, meanwhile=call.meanwhile,
            )  # fmt: skip

        try:
            return ask()
        except RefusedError:
            if not self.push or call.backend.holds(call.weights):
                raise
        # A server that was restarted has forgotten the weights: it is given them again, once a forward.
        self._give(call.weights, call.tally)
        call.tally.add(retries=1)
        return ask()

    def _give(self, weights: Weights, tally: Tally) -> None:
        assert self.tensors is not None
        if self.push and not self.tensors.holds(weights):
            started = time.perf_counter()
            sent = self.tensors.push(weights, deadline_s=self.deadline_s + weights.nbytes / _SLOWEST)
            tally.aside += time.perf_counter() - started
            self.stats.add("bytes_pushed", sent)

    @property
    def _patience(self) -> float:
        """Seconds that a busy server is waited for."""
        return min(_PATIENCE, self.deadline_s) if self.fallback_local else math.inf

    def _meanwhile(self, rows: int) -> float | None:
        """Seconds that an answer has at least before it is computed here; None waits for it to the deadline."""
        if not self.fallback_local:
            return None
        return max(_LATE, rows * (self.stats.mean("local") or 0.0) / _LATE_SHARE)

    def _row_bytes(self, shape: Sequence[int], dtype: torch.dtype, dialect: Dialect) -> int:
        count = math.prod(shape)
        if self.wire == "exact" or not shape or not dtype.is_floating_point:
            return count * dialect.nbytes(dtype)
        groups = -(-shape[-1] // GROUP)
        return math.prod(shape[:-1]) * groups * (GROUP + 2)

    def _fell_back(self, error: CloudError | InputError) -> None:
        if isinstance(error, CloudError):
            self.stats.failed(error)
        if not self.fallback_local:
            raise error
        if isinstance(error, InputError):
            self.stats.because("an input that the wire does not carry")
        elif self.stats.first(type(error).__name__):
            LOG.warning("%s: computed here, as from now on for this error in silence: %s", self.who, error)

    def _no_tensors(self) -> None:
        found = "there is no cloud backend"
        if self.backend is not None:
            found = f"{self.backend.rules.title} takes messages and returns tokens, it cannot run a layer"
        if not self.fallback_local:
            raise ConfigError(f"{self.who}: {found}", remedy=_DEPLOY)
        if self.backend is not None:
            LOG.warning("%s: %s: computed here. To compute it elsewhere, %s", self.who, found, _DEPLOY)
        else:
            LOG.warning("%s: %s: computed here", self.who, found)

    def _compare(self, rows: int, here: Callable[[], Tensor]) -> None:
        """Say once where computing elsewhere takes longer than here; the time here is measured with one forward."""
        if not self.fallback_local or self._is_compared:
            return
        self._remote_calls += 1  # a race between threads changes when, not what
        if self._remote_calls < _MEASURED_AFTER:
            return
        self._is_compared = True
        started = time.perf_counter()
        with torch.no_grad():
            here()
        self.stats.took("local", time.perf_counter() - started, rows)
        there, near = self.stats.mean("cloud"), self.stats.mean("local")
        if there and near and there > _LOSES * near:
            LOG.warning(
                "%s: elsewhere a row takes %.3g ms, here %.3g ms: offloading loses. Send more rows at once, or more "
                "layers in one block (RemoteBlock)", self.who, 1e3 * there, 1e3 * near,
            )  # fmt: skip


class _Call(NamedTuple):
    """One forward or backward, on its way."""

    backend: OIPBackend
    weights: Weights
    suffix: str
    output: Output
    deadline: Deadline
    identity: str
    tally: Tally
    meanwhile: float | None


@contextlib.contextmanager
def _ended(late: LateError | None) -> Iterator[None]:
    """Around what is computed in the meantime, whatever becomes of it."""
    try:
        yield
    finally:
        if late is not None:
            late.end()


def why_here(x: Tensor, *, autocast: bool = False) -> str | None:
    """Why an input is not sent: what no server takes, or what there is nothing to compute of.

    Args:
        x: the input.
        autocast: whether the caller knows what autocast does to its block, so that it is no reason.
    """
    if not autocast and torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if x.dtype not in ACTIVATIONS:
        return f"{x.dtype}"
    return None if x.numel() else "no rows"
