"""Broken installations, each diagnosed by real child processes: the cause is named, nothing else is blamed.

For the guide's table, with the torch of this environment: python tests/doctor/test_doctor_broken.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cases import CASES, build
from machines import Machine, has_compiler

from apt_model.cli.diagnosis.diagnose import diagnose
from apt_model.cli.diagnosis.finding import CODES
from apt_model.cli.diagnosis.system import here

WANTED_SECONDS = 3.0
"""The goal on the machine of the guide; not asserted, as machines of tests are slow now and then."""


def judged(name, made):
    """What is wrong with a diagnosis of a case, None if nothing is."""
    case = CASES[name]
    found = [each for each in made.findings if each.code == case.code and each.severity == case.severity]
    told = " ".join(f"{each.cause} {each.figure}" for each in found)
    if not all(words in told for words in case.says):
        return f"not found: {case.says} in {told or [each.code for each in made.findings]}"
    if not any(case.remedy in each.remedy for each in found):
        return f"no remedy {case.remedy!r} in {[each.remedy for each in found]}"
    others = {each.code for each in made.findings if each.severity != "note"} - {case.code} - case.beside
    return f"blamed too: {[each for each in made.findings if each.code in others]}" if others else None


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named_and_nothing_else_is_blamed(name, tmp_path):
    if CASES[name].compiled and not has_compiler():
        pytest.skip("no C compiler to make a driver's library with")
    machine = build(name, tmp_path)
    made = diagnose(machine.system(), machine.given)
    assert judged(name, made) is None
    print(f"{name}: {made.seconds:.2f} s")
    for each in made.findings:
        subprocess.run(["bash", "-n", "-c", each.remedy], check=True)  # noqa: S607 - it can be pasted
    assert all(each["end"] in ("exit", "signal", "idle") for each in made.probes), "a probe ran into the limit of time"
    assert list(machine.tmp.iterdir()) == [], "a file was left behind"


def test_there_are_twenty_and_each_has_a_code_that_is_explained():
    assert len(CASES) >= 20
    assert {case.code for case in CASES.values()} <= set(CODES)


def test_the_shortest_way_to_a_hidden_cause_is_through_the_real_torch(tmp_path):
    """torch itself names the backend alone; the doctor names the library."""
    machine = build("npu_without_cann", tmp_path, real=True)
    assert judged("npu_without_cann", diagnose(machine.system())) is None


def test_a_sound_machine_has_no_finding(tmp_path):
    machine = Machine(tmp_path, real=True)
    made = diagnose(machine.system())
    assert made.findings == []
    assert made.facts["device"]["kind"] == "cpu"
    assert made.facts["matmul_s"] > 0
    assert 0 < made.facts["locked_bytes"] <= made.facts["locked_tried_bytes"]
    assert made.facts["folder"]["write_gbps"] > 0
    assert {each["end"] for each in made.probes} == {"exit"}


def test_a_sound_machine_made_up_has_no_finding(tmp_path):
    assert diagnose(Machine(tmp_path).system()).findings == []


def test_this_machine(tmp_path):
    """Whatever it is: torch is imported here, so it must be found to work."""
    made = diagnose(here(), str(tmp_path))
    assert not [each for each in made.findings if each.code in ("APT-D12", "APT-D13", "APT-D14", "APT-D28", "APT-D90")]
    assert made.facts["matmul_s"] > 0


def _table():
    """Every case with the real torch where it is sound, as lines of a table; the exit code says whether all passed."""
    failed = 0
    rows = []
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            machine = build(name, Path(folder) / "machine", real=True)
            made = diagnose(machine.system(), machine.given)
        wrong = judged(name, made)
        failed += wrong is not None or made.seconds > WANTED_SECONDS
        rows.append(f"| {case.name} | {case.code} | {made.seconds:.2f} |" + (f" {wrong}" if wrong else ""))
        print(rows[-1], flush=True)
    print(f"{len(CASES) - failed} of {len(CASES)} named within {WANTED_SECONDS} s")
    return failed


if __name__ == "__main__":
    sys.exit(_table() > 0)
