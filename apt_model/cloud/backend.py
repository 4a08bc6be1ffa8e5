"""Accelerators elsewhere: each says what it can do; the Open Inference Protocol to those that take tensors."""

import math
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from apt_model.cloud import wire
from apt_model.cloud.client import Client, Tally
from apt_model.cloud.deadline import Clock, Deadline
from apt_model.cloud.dialect import EXTENSION, Dialect, Inference, find_path, path_of
from apt_model.cloud.endpoint import Endpoint
from apt_model.cloud.providers.table import RULES, Rules
from apt_model.cloud.refusals import parsed
from apt_model.cloud.tensors import Weights
from apt_model.cloud.transport import Request, Transport
from apt_model.core.errors import CloudError, ConfigError, RefusedError

_HEALTHY_FOR, _ILL_FOR = 30.0, 5.0  # seconds that an answer about health is believed, and that there was none
_PROBE = 5.0
_JSON = 4096  # bytes that are kept free for a request's JSON and a gateway's headers


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a probe found."""

    ok: bool
    why: str
    """In words, for either."""
    seconds: float = 0.0
    max_body: int | None = None
    """What the server says it takes, in bytes."""
    max_inflight: int | None = None
    max_upload: int | None = None


class CloudBackend(ABC):
    """One accelerator elsewhere, perhaps with replicas."""

    name: str
    rules: Rules

    @property
    def capabilities(self) -> frozenset[str]:
        """With "tensors" it runs our layers; with "tokens" it chats, and cannot run a layer."""
        return frozenset({self.rules.capability})

    @abstractmethod
    def health(self, *, fresh: bool = False) -> Health:
        """What it said when it was asked last; asked again where that is long ago, or where `fresh`."""

    def is_available(self) -> bool:
        """Whether it answered when it was asked last. Never raises."""
        return self.health().ok

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is, without a key."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and threads."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {'/'.join(sorted(self.capabilities))})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self  # copies of a layer share its connections

    def __reduce__(self) -> tuple[Any, ...]:
        raise ConfigError("a connection is not pickled", remedy="save the state_dict, and connect again after loading")


class OIPBackend(CloudBackend):
    """A server of the Open Inference Protocol v2 that holds weights of ours: `apt-model serve`, or another's.

    Args:
        transports: the endpoint and its replicas, which are of one kind, the preferred one first.
        name: as `get_backend` takes it.
        rules: of the gateway before it.
        client: that asks; None is made of `transports`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        name: str = "own",
        rules: Rules | None = None,
        client: Client | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.name = name
        self.rules = rules or RULES["own"]
        self.client = client or Client(transports)
        self._clock = clock
        self._health: tuple[float, Health] | None = None
        self._held: set[tuple[str, str]] = set()
        self._dialect: Dialect | None = None
        self._paths: dict[tuple[str, str], str] = {}
        self._pushing = threading.Lock()
        _alive.add(self)

    def health(self, *, fresh: bool = False) -> Health:
        """As `CloudBackend.health`."""
        known = self._health
        if known is None or fresh or self._clock() - known[0] > (_HEALTHY_FOR if known[1].ok else _ILL_FOR):
            known = (self._clock(), self._probed())
            self._health = known
        waits = [each.breaker.closed_in() for each in self.client.endpoints]
        if known[1].ok and all(waits):
            return Health(ok=False, why=f"left alone after failures, for another {min(waits):.0f} s")
        return known[1]

    def describe(self) -> dict[str, Any]:
        """As `CloudBackend.describe`."""
        return {
            "name": self.name, "provider": self.rules.title, "capabilities": sorted(self.capabilities),
            "endpoints": [each.transport.name for each in self.client.endpoints],
            "breakers": [each.breaker.state for each in self.client.endpoints],
        }  # fmt: skip

    def dialect(self, deadline: Deadline, *, tally: Tally | None = None, patience: float = math.inf) -> Dialect:
        """How its server is spoken to: what it said when it was last asked; asked again where it never answered.

        Raises:
            CloudError: as `Client.ask`.
        """
        if self._dialect is None and self._health is None:
            self.health()
        if self._dialect is None:
            request = Request(method="GET", path="/v2")
            response = self.client.ask(request, deadline, tally=tally, patience=patience)
            self._dialect = Dialect.of(parsed(response, self.name)) if response.status == 200 else Dialect()
        return self._dialect

    def limits(self) -> tuple[int, int]:
        """The largest request's and answer's body, in bytes: the gateway's and the server's own, as it said once."""
        known = self._said()
        server = known.max_body or wire.Limits().body_bytes
        return min(self.rules.request_bytes or server, server), min(self.rules.reply_bytes or server, server)

    def _said(self) -> Health:
        """What the server said of itself; asked again, after a while, where it did not answer."""
        known = self._health
        return known[1] if known is not None and known[1].ok else self.health()

    def upload_limit(self) -> int:
        """The largest file of weights, in bytes, that the gateway and the server take."""
        known = self._said()
        server = known.max_upload if known.max_upload is not None else self.limits()[0]
        return min(self.rules.request_bytes or server, server)

    def push(self, weights: Weights, *, deadline_s: float = 300.0, again: bool = False) -> int:
        """Make the server hold `weights`: bytes that were sent, 0 where it holds them already.

        A server that is not `apt-model serve` takes none; it is asked whether it holds them.

        Args:
            weights: what it is to hold.
            deadline_s: seconds for all of it.
            again: ask the server even where it is known to hold them.
        """
        key = (weights.model, weights.version)
        if key in self._held and not again:
            return 0
        with self._pushing:
            if key in self._held and not again:
                return 0
            if not self.dialect(Deadline(min(deadline_s, _PROBE))).own:
                self._paths.pop(key, None)
                self._found(key, Deadline(min(deadline_s, _PROBE)), None, math.inf)
                self._held.add(key)
                return 0
            sent, faults = 0, []
            for endpoint in self.client.endpoints:
                try:
                    sent += self._push_to(endpoint, weights, Deadline(deadline_s))
                except CloudError as error:  # noqa: PERF203 - a replica that is down keeps no other from being given them
                    faults.append(error)
            if len(faults) == len(self.client.endpoints):
                raise faults[0]
            self._held.add(key)
            return sent

    def infer(
        self,
        weights: Weights,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        deadline: Deadline,
        suffix: str = "",
        parameters: Mapping[str, Any] | None = None,
        identity: str | None = None,
        tally: Tally | None = None,
        patience: float = math.inf,
        meanwhile: float | None = None,
    ) -> dict[str, Tensor]:
        """Run a block there.

        Args:
            weights: the block's, which the server must hold (`push`).
            inputs: by name.
            outputs: name -> type and shape that must come back.
            deadline: of all attempts.
            suffix: ".bwd" for the backward.
            parameters: of the request.
            identity: of the forward, the same in all attempts; None makes one.
            tally: what is added to.
            patience: as `Client.ask`.
            meanwhile: as `Client.ask`.

        Raises:
            CloudError: as `Client.ask`, `LateError` too; `RefusedError` where the server does not hold the weights.
        """
        dialect = self.dialect(deadline, tally=tally, patience=patience)
        if parameters and not dialect.own:
            raise RefusedError(
                f"{self.name}: its server is not apt-model serve and does not know {', '.join(parameters)}",
                remedy='wire="exact"',
            )
        key = (weights.model + suffix, weights.version)
        path = path_of(*key) if dialect.own else self._found(key, deadline, tally, patience)
        asked = Inference.of(
            path, inputs, outputs, dialect=dialect, parameters=parameters or {}, identity=identity
        )  # fmt: skip
        response = self.client.ask(asked.request, deadline, tally=tally, patience=patience, meanwhile=meanwhile)
        if response.status == 404:
            self._held.discard((weights.model, weights.version))
            self._paths.pop(key, None)
            raise RefusedError(
                f"{self.name} does not hold {weights.model}{suffix} {weights.version}",
                remedy="apt-model cloud push, or let the layer push its weights (push=True)",
            )
        return asked.read(response, self.name)

    def holds(self, weights: Weights) -> bool:
        """Whether the server is known to hold `weights`; asks nobody."""
        return (weights.model, weights.version) in self._held

    def close(self) -> None:
        """As `CloudBackend.close`."""
        self.client.close()

    def renew(self) -> None:
        """In a forked child: locks that another thread held at that moment are free."""
        self._pushing = threading.Lock()
        self.client.renew()

    def _found(self, key: tuple[str, str], deadline: Deadline, tally: Tally | None, patience: float) -> str:
        """Where a server that is not ours holds a model of that version."""
        path = self._paths.get(key)
        if path is None:
            path = find_path(self.client, *key, deadline, tally=tally, patience=patience)
            self._paths[key] = path
        return path

    def _push_to(self, endpoint: Endpoint, weights: Weights, deadline: Deadline) -> int:
        path = f"/v2/repository/models/{weights.model}/versions/{weights.version}"
        one = self.client.only(endpoint)
        if one.ask(Request(method="GET", path=path), Deadline(min(deadline.seconds, _PROBE))).status < 300:
            return 0
        parts = weights.file()
        request = Request(method="PUT", path=path, headers={"Content-Type": "application/octet-stream"}, parts=parts)
        limit = self.upload_limit()
        if request.length > limit > 0:
            raise RefusedError(
                f"{self.name}: the weights are {request.length} bytes, {limit} pass in a body",
                remedy="put the file into the server's image, or start it with apt-model serve --weights FILE",
            )
        if limit == 0 or one.ask(request, deadline).status == 404:
            raise RefusedError(
                f"{self.name}: the server takes no weights", remedy="start it with apt-model serve --weights FILE"
            )
        return request.length

    def _probed(self) -> Health:
        started = time.perf_counter()
        deadline = Deadline(_PROBE)
        try:
            response = self.client.ask(Request(method="GET", path="/v2"), deadline, patience=0.0)
            if response.status != 200:
                return Health(ok=False, why=f"/v2 answers {response.status}: no server of the Open Inference Protocol")
            about = parsed(response, self.name)
            self._dialect = dialect = Dialect.of(about)
            ready = self.client.ask(Request(method="GET", path="/v2/health/ready"), deadline, patience=0.0)
        except (CloudError, ConfigError) as error:
            return Health(ok=False, why=error.message)
        if ready.status != 200:
            return Health(ok=False, why=f"/v2/health/ready answers {ready.status}: it is not ready")
        said = about.get("limits")
        limits: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        return Health(
            ok=True,
            why=f"{about.get('name', 'a server')} {about.get('version', '')}".strip()[:80]
            + ("" if dialect.binary else f", in JSON: it does not say that it has {EXTENSION}"),
            seconds=time.perf_counter() - started,
            max_body=_count(limits.get("max_body")), max_inflight=_count(limits.get("max_inflight")),
            max_upload=0 if limits.get("max_upload") == 0 else _count(limits.get("max_upload")),
        )  # fmt: skip


def rows_that_fit(limits: tuple[int, int], request_row: int, answer_row: int, who: str) -> int:
    """Rows (tokens) whose request and answer pass in one body; `RefusedError` where not even one does."""
    rows = min((limits[0] - _JSON) // max(request_row, 1), (limits[1] - _JSON) // max(answer_row, 1))
    if rows < 1:
        raise RefusedError(
            f"{who}: a row of {request_row} bytes, with {answer_row} in return, does not pass: {limits[0]} and "
            f"{limits[1]} bytes do",
            remedy='wire="int8g64" halves it',
        )
    return rows


_alive: "weakref.WeakSet[OIPBackend]" = weakref.WeakSet()


def _renew() -> None:
    for backend in list(_alive):
        backend.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
