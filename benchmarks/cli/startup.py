"""How long `apt-model --help` and other torch-free calls take, as whole processes.

python benchmarks/cli/startup.py            # 20 runs of each
python benchmarks/cli/startup.py 100
"""

import os
import platform
import statistics
import subprocess
import sys
import time

GOAL = 0.150  # seconds, for 95 of 100 runs of --help
CALLS = {
    "python -c pass": ["-c", "pass"],
    "apt-model --help": ["-m", "apt_model", "--help"],
    "apt-model --explain APT-E010": ["-m", "apt_model", "--explain", "APT-E010"],
    "apt-model generate --help": ["-m", "apt_model", "generate", "--help"],
    "apt-model train --help": ["-m", "apt_model", "train", "--help"],
}


def seconds(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)  # noqa: S603
    return time.perf_counter() - begin


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {runs} runs each"
    )
    print(f"{'':<30}{'least':>8}{'median':>8}{'p95':>8}{'most':>8}   milliseconds")
    for name, arguments in CALLS.items():
        seconds(arguments)  # the first fills the page cache
        taken = sorted(seconds(arguments) for _ in range(runs))
        p95 = statistics.quantiles(taken, n=20, method="inclusive")[-1]
        row = "".join(f"{1e3 * value:>8.0f}" for value in (taken[0], statistics.median(taken), p95, taken[-1]))
        verdict = (
            f"   goal {1e3 * GOAL:.0f}: {'met' if p95 <= GOAL else 'MISSED'}" if name.endswith("model --help") else ""
        )
        print(f"{name:<30}{row}{verdict}")


if __name__ == "__main__":
    main()
