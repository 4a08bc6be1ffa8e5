"""Which accelerators elsewhere there are: read from the environment, classified, probed once, and reported."""

import hashlib
import os
import threading
from dataclasses import dataclass
from typing import Any

from apt_model.cloud.backend import CloudBackend
from apt_model.cloud.providers.connect import NAMES, Connected, Connector, connect, over_http, settings
from apt_model.core.errors import CloudError, ConfigError

__all__ = ["CloudNPUManager", "CloudReport", "Found", "enable_cloud_npu", "get_cloud_npu_manager"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One provider."""

    name: str
    available: bool
    why: str
    """What it answered, or what is missing."""
    configured: bool = False
    provider: str = ""
    capabilities: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    """Addresses, without keys."""
    seconds: float = 0.0
    """Of the probe."""


@dataclass(frozen=True, kw_only=True)
class CloudReport:
    """What `enable_cloud_npu` found, and why not."""

    found: tuple[Found, ...]

    @property
    def available(self) -> list[str]:
        """Names of those that answered."""
        return [each.name for each in self.found if each.available]

    def __str__(self) -> str:
        return "\n".join(f"{each.name}: {_words(each)}" for each in self.found)


class CloudNPUManager:
    """The backends of this process. `get_cloud_npu_manager` returns the one that there is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._backends: dict[str, tuple[bytes, CloudBackend]] = {}
        self._retired: list[CloudBackend] = []

    def connect(self, names: tuple[str, ...] = NAMES, *, connector: Connector = over_http) -> CloudReport:
        """Read the environment anew for these names; what has not changed stays connected. Probes each once."""
        with self._connecting:
            return CloudReport(found=tuple(self._connect(name, connector) for name in names))

    def get_backend(self, name: str) -> CloudBackend | None:
        """The backend of that name, or None where it is not set up (or `enable_cloud_npu` was not called)."""
        if name not in NAMES:
            raise ConfigError(f"expected a cloud of {', '.join(NAMES)}, got {name!r}"[:200])
        with self._lock:
            found = self._backends.get(name)
        return found[1] if found else None

    def list_backends(self) -> list[str]:
        """Names of those that are set up."""
        with self._lock:
            return [name for name in NAMES if name in self._backends]

    def is_any_available(self) -> bool:
        """Whether one answered when it was asked last."""
        with self._lock:
            backends = [backend for _, backend in self._backends.values()]
        return any(each.is_available() for each in backends)

    def describe(self) -> list[dict[str, Any]]:
        """All of them, without keys; asks nobody."""
        with self._lock:
            return [backend.describe() for _, backend in self._backends.values()]

    def close(self) -> None:
        """Let go of all connections and threads; layers that hold a backend compute locally, or raise."""
        with self._lock:
            backends = [*self._retired, *(backend for _, backend in self._backends.values())]
            self._backends, self._retired = {}, []
        for backend in backends:
            backend.close()

    def renew(self) -> None:
        """In a forked child: locks that another thread held at that moment are free."""
        self._lock, self._connecting = threading.Lock(), threading.Lock()

    def __repr__(self) -> str:
        return f"CloudNPUManager({', '.join(self.list_backends()) or 'nothing is set up'})"

    def __reduce__(self) -> tuple[Any, ...]:
        return get_cloud_npu_manager, ()

    def _connect(self, name: str, connector: Connector) -> Found:
        # A digest: the values are kept nowhere but in the backend's secret.
        print_ = hashlib.sha256("\0".join([repr(connector), *settings(name)]).encode()).digest()
        with self._lock:
            known = self._backends.get(name)
        if known is not None and known[0] == print_:
            made = Connected(known[1], "")
        else:
            made = connect(name, connector)
            with self._lock:
                old = self._backends.pop(name, None)
                if old is not None:
                    self._retired.append(old[1])  # layers may hold it
                if made.backend is not None:
                    self._backends[name] = (print_, made.backend)
        if made.backend is None:
            return Found(name=name, available=False, why=made.why)
        health, about = made.backend.health(fresh=known is not None), made.backend.describe()
        return Found(
            name=name, available=health.ok, why=health.why, configured=True, provider=about["provider"],
            capabilities=tuple(about["capabilities"]), endpoints=tuple(about["endpoints"]), seconds=health.seconds,
        )  # fmt: skip


def enable_cloud_npu(which: str = "auto", *, connector: Connector = over_http) -> CloudReport:
    """Connect what the environment describes, and say what was found and why not. Prints nothing.

    The name is a legacy: RunPod and SaladCloud rent GPUs.

    Args:
        which: "auto", or one of huawei, runpod, salad and own, which then must be there.
        connector: from an address and a key's header to a transport; for tests.

    Raises:
        ConfigError: a name that is none, or a cloud that was named and is not set up.
        CloudError: a cloud that was named and does not answer.
    """
    if which == "auto":
        return _manager.connect(connector=connector)
    if which not in NAMES:
        raise ConfigError(f"expected auto or a cloud of {', '.join(NAMES)}, got {which!r}"[:200])
    report = _manager.connect((which,), connector=connector)
    found = report.found[0]
    if not found.configured:
        raise ConfigError(f"{which}: {found.why}", remedy="docs/CLOUD_NPU_GUIDE.md lists what each cloud needs")
    if not found.available:
        raise CloudError(f"{which} does not answer: {found.why}", remedy="apt-model cloud status")
    return report


def get_cloud_npu_manager() -> CloudNPUManager:
    """The manager of this process."""
    return _manager


_manager = CloudNPUManager()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_manager.renew)


def _words(found: Found) -> str:
    if not found.configured:
        return f"not set up: {found.why}"
    kinds = " and ".join(found.capabilities)
    return f"{found.provider}, {kinds}, {'available' if found.available else 'not available'}: {found.why}"
