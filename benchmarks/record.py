"""What every benchmark writes beside its figures: the machine, the versions, the commit, the measured ceilings."""

import datetime as dt
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from apt_model.core.files import write_text
from apt_model.core.system.cpu import CpuDevice


def machine() -> dict[str, Any]:
    """Device, driver, versions and commit of this run."""
    found: dict[str, Any] = {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("BENCH_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        import triton

        found["device"] = torch.cuda.get_device_name()
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["triton"] = triton.__version__
    else:
        found["device"] = "cpu"
    return found


def processor() -> str:
    """The host's name and cores, for figures that are the host's alone."""
    return f"{CpuDevice().name()}, {os.cpu_count()} cores"


def ceilings() -> dict[str, float]:
    """Measured limits of the device: bf16 matrix product in TFLOP/s and copy (read plus write) in TB/s."""
    if not torch.cuda.is_available():
        return {}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = gpu_seconds(lambda: a @ b, repeat=10)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = gpu_seconds(lambda: target.copy_(source), repeat=10)
    return {"bf16_tflops": 2 * 8192**3 / product / 1e12, "copy_tb_s": 2 * source.nbytes / copy / 1e12}


def gpu_seconds(call: Any, *, repeat: int, warm_up: int = 3) -> float:
    """Mean GPU time of `call` by events around `repeat` calls."""
    for _ in range(warm_up):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeat


def graph_seconds(call: Any, *, repeat: int = 20, rounds: int = 5) -> float:
    """Median GPU time of `call` from replays of a CUDA graph that holds it `repeat` times: no launch from the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    return statistics.median(gpu_seconds(graph.replay, repeat=3, warm_up=1) for _ in range(rounds)) / repeat


def header() -> dict[str, Any]:
    """What stands above the rows."""
    return {"machine": machine(), "ceilings": ceilings()}


def write(
    name: str, rows: list[dict[str, Any]], *, folder: Path | None = None, above: dict[str, Any] | None = None
) -> Path:
    """Write the rows below `above` (None: `header()` now) to benchmarks/results/<device>/<name>.json, in one step."""
    above = above or header()
    device = above["machine"]["device"].lower().replace(" ", "-")
    path = (folder or Path(__file__).parent / "results" / device) / f"{name}.json"
    write_text(path, json.dumps({**above, "rows": rows}, indent=1) + "\n")
    return path


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
