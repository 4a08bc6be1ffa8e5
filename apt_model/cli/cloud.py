"""`apt-model cloud`: which accelerators elsewhere are set up, weights pushed once, a real round trip, a chat."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from apt_model.cli import output
from apt_model.cli.options import GlobalOptions, parse
from apt_model.core.errors import CloudError, ConfigError, DataError

if TYPE_CHECKING:
    from apt_model.cloud.backend import CloudBackend, OIPBackend
    from apt_model.cloud.manager import CloudReport

Action = Literal["status", "push", "test", "chat"]


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Accelerators elsewhere, as the environment describes them; keys are never shown.

    status: what is set up, asked once. push: give servers a safetensors file whose metadata name its kind. test: push a
    small layer, compute it there and here, and compare. chat: ask a model of Huawei Cloud MaaS.
    """

    action: Annotated[tyro.conf.Positional[Action], tyro.conf.arg(metavar="{status,push,test,chat}")] = "status"
    """What to do."""
    cloud: Literal["auto", "huawei", "runpod", "salad", "own"] = "auto"
    """One cloud, which must answer, or all that are set up."""
    file: str | None = None
    """Of push: weights as one safetensors file."""
    kind: str | None = None
    """Of push: the block's kind, where the file's metadata do not say it."""
    width: int = 1024
    """Of test: inputs and outputs of the layer."""
    rows: int = 32
    """Of test: rows of a forward."""
    forwards: int = 20
    """Of test: forwards that are timed."""
    prompt: str | None = None
    """Of chat: what is asked."""
    max_tokens: int = 256
    """Of chat: the longest answer."""


def run(args: Sequence[str]) -> int:
    """Do it; 0 where it succeeded, the error's exit code where nothing answers."""
    options = parse(Options, args, "cloud")
    _check(options)
    # After the options, which need no torch.
    from apt_model.cloud.manager import enable_cloud_npu, get_cloud_npu_manager  # noqa: PLC0415

    report = enable_cloud_npu(options.cloud)
    try:
        if options.action == "status":
            return _status(options, report)
        backends = [get_cloud_npu_manager().get_backend(name) for name in report.available]
        wanted = "tokens" if options.action == "chat" else "tensors"
        fitting = [each for each in backends if each is not None and wanted in each.capabilities]
        if not fitting:
            raise CloudError(
                f"no cloud that is set up and answers takes {wanted}", remedy="apt-model cloud status says why"
            )
        done = [_ACTIONS[options.action](options, each) for each in fitting]
        if options.format == "json":
            output.write_json({"clouds": done})
        return 0
    finally:
        get_cloud_npu_manager().close()


def _check(options: Options) -> None:
    for action, name in (("push", "file"), ("chat", "prompt")):
        if options.action == action and getattr(options, name) is None:
            raise ConfigError(f"missing: --{name}", remedy=f"apt-model cloud {action} --{name} ...")
    for name in ("width", "rows", "forwards", "max_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(options, name)}")


def _status(options: Options, report: "CloudReport") -> int:
    if options.format == "json":
        output.write_json({"clouds": [vars(each) for each in report.found]})
    else:
        rows = []
        for each, line in zip(report.found, str(report).splitlines(), strict=True):
            place = f" ({', '.join(each.endpoints)})" if each.endpoints else ""
            rows.append((each.name, line.partition(": ")[2] + place))
        output.write_facts(rows)
        if not options.quiet:
            output.write_hints("apt-model cloud test" if report.available else "docs/CLOUD_NPU_GUIDE.md: what to set")
    return 0 if report.available else CloudError.exit_code


def _push(options: Options, backend: "CloudBackend") -> dict[str, Any]:
    assert options.file is not None
    weights = _weights(Path(options.file), options.kind)
    started = time.perf_counter()
    sent = _tensors(backend).push(weights)
    found = {
        "name": backend.name, "model": weights.model, "version": weights.version, "bytes_sent": sent,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if options.format != "json":
        how = f"{output.size(sent)} in {found['seconds']:.1f} s" if sent else "it held them already"
        output.write_facts([(backend.name, f"{weights.model}, version {weights.version}: {how}")])
    return found


def _weights(path: Path, kind: str | None) -> Any:
    import json  # noqa: PLC0415 - not for --help

    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    from apt_model.cloud.tensors import Weights  # noqa: PLC0415

    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        config = json.loads(about.get("config", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: expected a safetensors file, got {error}"[:300]) from error
    kind = kind or about.get("kind")
    if kind is None:
        raise DataError(f"{path}: its metadata do not name the kind of block", remedy="--kind linear, for one")
    return Weights(kind=kind, config=config, tensors=tensors)


def _test(options: Options, backend: "CloudBackend") -> dict[str, Any]:
    import torch  # noqa: PLC0415

    from apt_model.cloud.linear import CloudNPULinear  # noqa: PLC0415

    torch.manual_seed(0)
    layer = CloudNPULinear(options.width, options.width, cloud_backend=backend, fallback_local=False)
    x = torch.randn(options.rows, options.width)
    with torch.no_grad():
        pushed = layer.push_weights()
        for _ in range(options.forwards):
            found = layer(x)
        worst = float((found - torch.nn.functional.linear(x, layer.weight, layer.bias)).abs().max())
    stats = layer.get_stats()
    told = {
        "name": backend.name, "bytes_pushed": pushed, "forwards": stats["cloud_calls"], "worst_error": worst,
        "bytes_sent": stats["bytes_sent"] // options.forwards,
        "bytes_received": stats["bytes_received"] // options.forwards,
        "p50_ms": 1e3 * stats["latency_p50"], "p99_ms": 1e3 * stats["latency_p99"],
        "retries": stats["retries"],
    }  # fmt: skip
    if options.format != "json":
        output.write_facts(
            [
                ("layer", f"{options.width} x {options.width}, {options.rows} rows, every product checked"),
                ("pushed", output.size(pushed) if pushed else "it held the weights already"),
                ("round trip", f"{told['p50_ms']:.2f} ms median, {told['p99_ms']:.2f} ms at worst of a hundred"),
                ("a forward", f"{told['bytes_sent']:,} bytes there, {told['bytes_received']:,} back"),
                ("difference", f"{worst:.2g} at most from here"),
            ],
            backend.name,
        )
    return told


def _chat(options: Options, backend: "CloudBackend") -> dict[str, Any]:
    from apt_model.cloud.providers.maas import MaaSBackend  # noqa: PLC0415

    assert isinstance(backend, MaaSBackend)
    assert options.prompt is not None
    said = backend.chat(options.prompt, max_tokens=options.max_tokens)
    if options.format != "json":
        output.write_text(said)
    return {"name": backend.name, "model": backend.model, "text": said}


def _tensors(backend: "CloudBackend") -> "OIPBackend":
    from apt_model.cloud.backend import OIPBackend  # noqa: PLC0415

    assert isinstance(backend, OIPBackend)
    return backend


_ACTIONS = {"push": _push, "test": _test, "chat": _chat}
