"""What `apt-model doctor` prints for people: the verdict, each cause with its remedy, what was measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from apt_model.cli import output
from apt_model.cli.diagnosis.diagnose import Diagnosis

_LABEL = len("APT-D00 warning")


def tell(made: Diagnosis, *, quick: bool, hints: bool) -> None:
    """The verdict first, then findings, then facts, then what to do next."""
    output.write(f"{verdict(made)}, {'nothing was tried' if quick else 'probes included'}, {made.seconds:.1f} s\n")
    rows: list[tuple[str, str]] = []
    for finding in made.findings:
        rows.append((f"{finding.code} {finding.severity}", finding.cause))
        rows += [("  found", finding.figure)] if finding.figure else []
        rows += [("  remedy", finding.remedy)] if finding.remedy else []
    # Not in a table, whose frame would break a remedy that is copied.
    output.write("".join(f"  {name:<{_LABEL}}  {text}\n" for name, text in rows))
    output.write_facts(list(_facts(made.facts)), "what is there" if quick else "what is there, as measured")
    if hints:
        output.write_hints(*_next(made, quick=quick))


def verdict(made: Diagnosis) -> str:
    """What it comes to, in a line."""
    counts = {name: made.count(name) for name in ("broken", "warning", "note")}
    parts = [f"{counts['broken']} broken"] if counts["broken"] else ["nothing is broken"]
    parts += [f"{counts[name]} {name}{'s'[: counts[name] > 1]}" for name in ("warning", "note") if counts[name]]
    return ", ".join(parts)


def _next(made: Diagnosis, *, quick: bool) -> list[str]:
    if made.findings and made.findings[0].severity != "note":
        code = made.findings[0].code
        return [f"apt-model --explain {code}", "apt-model doctor --format json > doctor.json  # for a bug report"]
    if quick:
        return ["apt-model doctor"]
    return ["apt-model plan MODEL --gpu 8GiB --ram 16GiB --measure"]


def _facts(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "python", facts["python"]
    yield "packages", ", ".join(f"{name} {version}" for name, version in facts["packages"].items()) or "none is found"
    if facts["torch_build"]:
        seconds = facts["import_torch_s"]
        yield "torch", f"{facts['torch_build']} build" + (f", imported in {seconds:.2f} s" if seconds else "")
    device = facts["device"]
    if device:
        memory = f"{output.size(device['free'])} free of {output.size(device['memory'])}"
        yield "device", f"{device['kind']}: {device['name']}, {memory}"
    if facts["matmul_s"]:
        triton = ", and a Triton kernel" if facts["triton_kernel_s"] else ""
        yield "kernel", f"a small product in {facts['matmul_s'] * 1e6:.0f} us{triton}; results are right"
    if facts["driver"]:
        runs = f", runs CUDA {facts['driver_cuda']}" if facts["driver_cuda"] else ""
        yield "driver", f"NVIDIA {facts['driver']}{runs}"
    yield "memory", _memory(facts)
    for name in ("locked", "pinned"):
        if facts[f"{name}_bytes"] is not None:
            yield name, _until(facts[f"{name}_bytes"], facts[f"{name}_tried_bytes"])
    yield "folder", _folder(facts["folder"])
    clouds = [service for service, whole in facts["clouds"].items() if all(whole.values())]
    yield "clouds", ", ".join(clouds) or "none is set up"


def _memory(facts: Mapping[str, Any]) -> str:
    machine, limit, free = (facts[name] for name in ("memory_bytes", "memory_limit_bytes", "memory_free_bytes"))
    under = f", {output.size(limit)} of it by the control group" if limit < machine else ""
    return f"{output.size(machine)}{under}" + ("" if free is None else f", {output.size(free)} free")


def _until(count: int, tried: int) -> str:
    return f"{output.size(count)}, {'no more' if count < tried else 'more was not tried'}"


def _folder(folder: Mapping[str, Any]) -> str:
    said = folder["path"] + (f" ({folder['type']})" if folder["type"] else "")
    if folder["free_bytes"] is not None:
        said += f", {output.size(folder['free_bytes'])} free"
    if folder["write_gbps"] is not None:
        cached = "" if folder["direct"] else ", through the page cache"
        said += f", writes {folder['write_gbps']:.2f} GB/s, reads {folder['read_gbps']:.2f} GB/s{cached}"
    return said
