"""Fuzz steps of one seed on both readers: the server's of requests, the client's of answers.

    python benchmarks/cloud/fuzz.py [--steps 1000000] [--seed 0] [--first 0] [--folder amd-epyc-2-cores]

Prints a row of JSON, and writes it to benchmarks/results/FOLDER/cloud_fuzz.json where a folder is given. The first step
that raises anything but our own errors ends it with 1 and is named: --first N --steps 1 repeats that one.
"""

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cloud"), str(ROOT / "benchmarks")]

import psutil  # noqa: E402
import record  # noqa: E402
from fuzzing import Fuzzer  # noqa: E402

_PIECE = 50_000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--folder", help="below benchmarks/results, to keep the record")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    above = {
        "machine": {**record.machine(), "device": record.processor()},
        "command": " ".join(["python", "benchmarks/cloud/fuzz.py", *sys.argv[1:]]),
    }
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), options.seed)
        end, before, began = options.first + options.steps, None, time.perf_counter()
        for first in range(options.first, end, _PIECE):
            fuzzer.run(first, min(_PIECE, end - first))
            before = before or process.memory_info().rss
            print(f"{first + min(_PIECE, end - first)} of {end}", file=sys.stderr)
        seconds = time.perf_counter() - began
        fuzzer.backend.close()
    counted = {f"{side} {kind}": count for (side, kind), count in sorted(fuzzer.found.items(), key=str)}
    row = {
        "steps": options.steps, "seed": options.seed, "first": options.first, "uncaught": 0,
        "seconds": round(seconds, 1), "steps_a_second": round(options.steps / seconds), "outcomes": counted,
        "different_refusals": len(fuzzer.words),
        # After the first piece, when caches are full.
        "rss_growth_mib": round((process.memory_info().rss - before) / 2**20, 1),
        "rss_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }  # fmt: skip
    print(json.dumps(row))
    if options.folder:
        place = ROOT / "benchmarks" / "results" / options.folder
        print(record.write("cloud_fuzz", [row], folder=place, above=above))
    return 0


if __name__ == "__main__":
    sys.exit(main())
