"""`apt-model doctor` as a command: verdict, exit code, both formats, options, and nothing of the user in the JSON."""

import json
import re

import pytest
from cases import build
from machines import Machine

from apt_model.cli import doctor
from apt_model.cli.main import main


@pytest.fixture
def call(capfd, monkeypatch):
    def run(machine, *args):
        monkeypatch.setattr(doctor, "here", machine.system)
        capfd.readouterr()
        code = main(["doctor", *map(str, args)])
        return code, *capfd.readouterr()

    return run


def test_a_sound_machine_is_told_in_one_line_and_leaves_with_0(call, tmp_path):
    code, out, err = call(Machine(tmp_path / "m"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(r"nothing is broken, probes included, \d+\.\d s", lines[0])
    assert not re.search("APT-D", out)
    assert "results are right" in out
    assert lines[-1].startswith("next      apt-model plan")
    assert out.isascii()


def test_a_broken_one_leaves_with_1_and_names_the_remedy(call, tmp_path):
    code, out, _ = call(build("npu_without_cann", tmp_path / "m"))
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("1 broken, ")
    assert "libhccl.so" in lines[1]
    assert any("remedy" in line and "uninstall -y torch-npu" in line for line in lines[1:5])
    assert "next      apt-model --explain APT-D11" in lines


def test_a_warning_leaves_with_0(call, tmp_path):
    code, out, _ = call(build("misspelt_variable", tmp_path / "m"), "--quick", "--quiet")
    assert code == 0
    assert out.startswith("nothing is broken, 1 warning, nothing was tried, ")
    assert "next " not in out


def test_quick_starts_no_process_and_says_so(call, tmp_path):
    machine = build("illegal_instruction", tmp_path / "m")
    code, out, _ = call(machine, "--quick", "--format", "json")
    told = json.loads(out)
    assert code == 0
    assert (told["probed"], told["probes"], told["facts"]["locked_bytes"]) == (False, [], None)
    code, out, _ = call(machine, "--format", "json")
    told = json.loads(out)
    assert (code, told["probed"], told["verdict"]) == (1, True, "broken")
    assert {each["probe"]: each["end"] for each in told["probes"]}["torch"] == "signal"


def test_the_folder_given_is_the_one_that_is_tried(call, tmp_path):
    machine = Machine(tmp_path / "m")
    place = tmp_path / "disk of ours"
    _, out, _ = call(machine, "--folder", place)
    assert f"{place} is not a folder" in out
    assert f"mkdir -p '{place}'" in out
    place.mkdir()
    code, out, _ = call(machine, "--folder", place)
    assert code == 0
    assert f"folder    {place} (ext4)" in out
    assert list(place.iterdir()) == []


FIELDS = {"code", "severity", "cause", "figure", "remedy"}


def test_the_json_names_neither_user_nor_host_nor_folder_nor_key(call, tmp_path, monkeypatch):
    """Where everything that can carry a name does."""
    home = tmp_path / "home" / "canaryuser"
    machine = Machine(home / "m")
    machine.changes |= {"home": home, "private": ("canaryuser", "canaryhost")}
    secrets = ("sk-CANARYKEY0123", "https://canaryuser:CANARYKEY@endpoint.canary.example/", "CANARYMODEL")
    names = ("HUAWEI_CLOUD_API_KEY", "HUAWEI_CLOUD_ENDPOINT", "HUAWEI_CLOUD_MODEL")
    machine.environ |= dict(zip(names, secrets, strict=True))
    machine.environ |= {
        "RUNPOD_API_KEY": secrets[0],
        "SALAD_ENDPOINT": "http://CANARYKEY.example",
        "APT_DEVICE": "cuda:9",
    }
    machine.environ |= {"USER": "canaryuser", "HOSTNAME": "canaryhost"}
    where = home / "projects"
    machine.package("tokenizers", f"raise OSError('canaryhost: cannot read {where}/x of canaryuser')")
    (where / "torch").mkdir(parents=True)
    (where / "torch" / "__init__.py").write_text("raise RuntimeError(f'{__file__} of CanaryUser')\n")
    machine.first.append(str(where))
    monkeypatch.chdir(where)
    code, out, err = call(machine, "--format", "json", "--folder", where / "nowhere")
    assert code == 1
    told = json.loads(out)
    assert "canary" not in (out + err).lower()
    assert str(tmp_path) not in out
    assert all(set(each) == FIELDS for each in told["findings"])
    assert {"APT-D06", "APT-D40", "APT-D50", "APT-D51"} <= {each["code"] for each in told["findings"]}
    assert told["facts"]["clouds"]["RunPod"] == {"RUNPOD_API_KEY": True, "RUNPOD_ENDPOINT_ID": False}
    code, out, err = call(machine)
    assert "canarykey" not in (out + err).lower()
    assert "canarymodel" not in (out + err).lower()


def test_a_code_is_explained(capfd):
    assert main(["--explain", "APT-D11"]) == 0
    out = capfd.readouterr().out
    assert "finding of apt-model doctor" in out
    assert "hides the cause" in out


def test_on_a_terminal_facts_are_drawn_and_remedies_can_be_copied(call, tmp_path, monkeypatch):
    from apt_model.cli import output

    drawn = []
    monkeypatch.setattr(output.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(output, "_draw", lambda _, rows: drawn.append(rows))
    _, out, _ = call(build("misspelt_variable", tmp_path / "m"), "--quick")
    assert [rows[0][0] for rows in drawn] == ["python"]
    assert re.search(r'^    remedy  +export APT_DEVICE="\$APT_DEVCIE"; unset APT_DEVCIE$', out, flags=re.MULTILINE)
