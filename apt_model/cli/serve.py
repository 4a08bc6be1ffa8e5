"""`apt-model serve`: hold weights, and compute with them for others over HTTP."""

import json
import logging
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from apt_model.cli import output
from apt_model.cli.options import GlobalOptions, parse
from apt_model.cloud.server.config import ServerConfig, bytes_of, check_public
from apt_model.cloud.server.key import Key
from apt_model.core import env
from apt_model.core.errors import AptError, ConfigError, InputError

if TYPE_CHECKING:
    from apt_model.cloud.server.models import Model, Models, Place
    from apt_model.cloud.server.store import Store

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Hold weights and compute with them for others: the Open Inference Protocol v2 over HTTP.

    A model's version is a digest of its weights. SIGTERM ends it once what is in flight is answered.
    """

    weights: str | None = None
    """A safetensors file to serve."""
    block: str | None = None
    """What it is: linear, mlp, apt_block or hf_block. None: what the file itself says."""
    config: str | None = None
    """The block's options, JSON or a file of it: {"quantize": "nvfp4"} keeps any block in 4 bits."""
    prefix: str = ""
    """Take only the tensors whose names begin so, without it: "model.layers.0.mlp.up_proj."."""
    name: str = "model"
    """What clients call it."""
    device: str = "auto"
    """Where it computes: auto, cpu, cuda, cuda:1."""
    host: str = "127.0.0.1"
    """The address to listen at; :: is every one."""
    port: int = 8080
    """0 takes a free one and says which."""
    token_env: str | None = None
    """The variable that holds the key clients must send. None: only this machine's clients are served."""
    insecure: tyro.conf.FlagCreatePairsOff[bool] = False
    """Serve others without a key, behind a gateway that asks for one."""
    max_body: str = "64MiB"
    """Largest request, and largest answer."""
    max_inflight: int = 8
    """Forwards that wait or run at once; the next is told to come again."""
    allow_upload: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take weights from clients."""
    store: str | None = None
    """The folder of uploaded weights, which are served again after a restart. None: a temporary one."""
    max_store: str = "1GiB"
    """Most that may be in it."""
    gpu_mb: float | None = None
    """Stream the weights through this much of the GPU, in MB of 10^6 bytes; with --ram-mb."""
    ram_mb: float | None = None
    """Hold at most this much of them in RAM."""
    ssd_mb: float | None = None
    """Hold at most this much of them on disk."""


def run(args: Sequence[str]) -> None:
    """Serve until told to stop."""
    options = parse(Options, args, "serve")
    config = _server_config(options)
    check_public(options.host, config)
    if options.weights is None and not (options.allow_upload or options.store):
        raise ConfigError("missing: --weights FILE", remedy="or --allow-upload, and clients bring them")
    # After the options, which need no torch.
    from apt_model.cli.serving import apt_block, hf_block  # noqa: PLC0415
    from apt_model.cloud.server.app import Application  # noqa: PLC0415
    from apt_model.cloud.server.blocks import register  # noqa: PLC0415
    from apt_model.cloud.server.models import Models  # noqa: PLC0415
    from apt_model.cloud.server.run import serve  # noqa: PLC0415

    for kind in (apt_block.KIND, hf_block.KIND):
        register(kind)
    given = _given(options)
    with ExitStack() as held:
        models = Models(_place(options, held))
        store = _store(options, config, held)
        if options.weights is not None:
            models.loading.add(options.name)
        opened = threading.Event()
        told: dict[str, Any] = {}

        def load() -> None:
            _load(options, models, store, given)
            opened.wait()
            _tell_ready(options, models.all(), told["url"])

        app = Application(config, models, store if options.allow_upload else None, load)

        def on_start(port: int) -> None:
            told["url"] = _url(options.host, port)
            if options.format == "human":
                output.write(f"listening at {told['url']}\n")
                sys.stdout.flush()
            opened.set()

        def on_tick() -> None:
            if app.failed is not None:
                raise app.failed

        serve(app, options.host, options.port, on_start=on_start, on_tick=on_tick)


def _server_config(options: Options) -> ServerConfig:
    secret = None
    if options.token_env is not None:
        secret = env.named(options.token_env)
        if secret is None:
            raise ConfigError(
                f"--token-env {options.token_env}: there is no such variable, or it is empty",
                remedy=f"export {options.token_env}=$(openssl rand -hex 32)",
            )
    return ServerConfig(
        key=Key(secret) if secret is not None else None, open_to_all=options.insecure,
        max_body=bytes_of(options.max_body, "--max-body"), max_inflight=options.max_inflight,
        allow_upload=options.allow_upload, max_store=bytes_of(options.max_store, "--max-store"),
    )  # fmt: skip


def _given(options: Options) -> dict[str, Any] | None:
    """Kind and configuration by the options; None where the file is to say."""
    if options.block is None:
        if options.config is not None:
            raise ConfigError("--config without --block", remedy="--block linear, mlp, apt_block or hf_block")
        return None
    text = options.config or "{}"
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: expected JSON or a file of it: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--config: expected an object, got {type(config).__name__}")
    return {"kind": options.block, "config": config}


def _place(options: Options, held: ExitStack) -> "Place":
    """Where weights go, as the options say."""
    from apt_model.cli.serving.placing import levels, place_in, place_on  # noqa: PLC0415
    from apt_model.core.system import get_device  # noqa: PLC0415
    from apt_model.optimization.vgpu_stack import VGPUStack  # noqa: PLC0415

    device = get_device(options.device)
    if options.ram_mb is None:
        if options.gpu_mb is not None or options.ssd_mb is not None:
            raise ConfigError("--gpu-mb and --ssd-mb go with --ram-mb", remedy="add --ram-mb 8000, or leave them out")
        return place_on(device)
    if device.type == "cpu" and options.gpu_mb is not None:
        raise ConfigError("--gpu-mb goes with an accelerator, and this computes on the CPU", remedy="leave it out")
    if device.type != "cpu" and options.gpu_mb is None:
        raise ConfigError(
            f"--ram-mb on {device} goes with --gpu-mb, through which the weights come",
            remedy="add --gpu-mb 4000, or --device cpu to compute from RAM",
        )
    stack = VGPUStack(levels(device, options.gpu_mb, options.ram_mb, options.ssd_mb))
    held.callback(stack.close, restore=False)
    return place_in(stack)


def _store(options: Options, config: ServerConfig, held: ExitStack) -> "Store | None":
    from apt_model.cloud.server.store import Store  # noqa: PLC0415

    if options.store is not None:
        return Store(Path(options.store), config.max_store)
    if not options.allow_upload:
        return None
    return Store(Path(held.enter_context(tempfile.TemporaryDirectory(prefix="apt-serve-"))), config.max_store)


def _load(options: Options, models: "Models", store: "Store | None", given: dict[str, Any] | None) -> None:
    """All that is to be served. What the store holds and is damaged is left out, and said."""
    for name, version, path in store.files() if store is not None else ():
        _load_stored(models, name, version, path)
    if options.weights is not None:
        models.load(options.name, Path(options.weights), given, options.prefix)
        models.loading.discard(options.name)


def _load_stored(models: "Models", name: str, version: str, path: Path) -> None:
    from apt_model.cloud.server.store import version_of  # noqa: PLC0415

    try:
        found = version_of(path)
        if found != version:
            raise InputError(f"expected weights of version {version}, as the file is called, got those of {found}")
        models.load(name, path)
    except AptError as error:
        LOG.warning("%s is not served: %s", path, error.message)


def _tell_ready(options: Options, models: "list[Model]", url: str) -> None:
    facts = [
        {"name": model.name, "version": model.version, "kind": model.kind, "device": str(model.device)}
        for model in models
    ]
    if options.format == "json":
        output.write_json({"url": url, "models": facts})
    else:
        for each in facts:
            output.write(f"{each['name']} {each['version']}: {each['kind']} on {each['device']}\n")
        output.write("ready\n")
        if not options.quiet:
            output.write_hints(f"curl {url}/v2")
    sys.stdout.flush()


def _url(host: str, port: int) -> str:
    shown = {"::": "[::1]", "0.0.0.0": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"
