"""Weights that clients bring: whole, of the version they are called by, within the store, or refused."""

import asyncio
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from served import application, ask, infer, told
from small_models import noise

from apt_model.cloud.identity import digest_of
from apt_model.cloud.server.models import Models, on_device
from apt_model.cloud.server.store import Store


def upload(seed=0, kind="linear", config="{}", wide=16):
    """A file, its tensors, and its version as a client finds it."""
    tensors = {"weight": noise(24, wide, seed=seed), "bias": noise(24, seed=seed)}
    named = {name: ("F32", tuple(each.shape), each.numpy().tobytes()) for name, each in tensors.items()}
    body = save(tensors, metadata={"kind": kind, "config": config})
    return body, tensors, digest_of({"kind": kind, "config": json.loads(config)}, named)


def at(version, name="m"):
    return f"/v2/repository/models/{name}/versions/{version}"


def call(app, *args, **options):
    return asyncio.run(ask(app, *args, **options))


def test_up_once_then_there(tmp_path):
    app = application(tmp_path, store=True)
    body, tensors, version = upload()
    assert call(app, "GET", at(version))[0] == 404
    code, _, answer = call(app, "PUT", at(version), pieces=[body[:7], body[7:100], body[100:]])
    assert (code, json.loads(answer)) == (201, {"name": "m", "version": version})
    assert call(app, "GET", at(version))[0] == 200
    code, headers, _ = call(app, "PUT", at(version), body)
    assert (code, "connection" in headers) == (200, False)
    x = noise(3, 16, seed=5)
    assert torch.equal(infer(app, "m", {"x": x})["y"], F.linear(x, **tensors))
    assert call(app, "POST", at(version))[1]["allow"] == "GET, PUT, DELETE"


def test_two_versions_beside_each_other_and_gone_again(tmp_path):
    app = application(tmp_path, store=True)
    held = [upload(seed) for seed in (0, 1)]
    for body, _, version in held:
        assert call(app, "PUT", at(version), body)[0] == 201
    assert app.models.versions("m") == [version for _, _, version in held]
    x = noise(3, 16, seed=5)
    for _, tensors, version in held:
        y = infer(app, "m", {"x": x}, path=f"/v2/models/m/versions/{version}/infer")["y"]
        assert torch.equal(y, F.linear(x, **tensors))
    gone = held[0][2]
    assert call(app, "DELETE", at(gone))[0] == 200
    assert [call(app, method, at(gone))[0] for method in ("GET", "DELETE")] == [404, 404]
    assert call(app, "POST", f"/v2/models/m/versions/{gone}/infer")[0] == 404
    assert not list(tmp_path.glob(f"store/*/{gone}*"))


def test_what_is_refused_leaves_nothing(tmp_path):
    app = application(tmp_path, store=True)
    body, _, version = upload()
    other = upload(seed=1)[2]
    huge = (1 << 40).to_bytes(8, "little") + body[8:]
    strange, _, strange_version = upload(kind="os.system")
    option, _, option_version = upload(config='{"code": "import os"}')
    bent = bytearray(body)
    bent[-1] ^= 1
    cases = (
        (body, other, "got those of"),
        (bytes(bent), version, "got those of"),
        (body[:-1], version, "truncated"),
        (body + b"\0", version, "longer"),
        (huge, version, "header"),
        (b"", version, "header"),
        (b"\xff" * 64, version, "header"),
        (strange, strange_version, "expected a block of"),
        (option, option_version, "has no option 'code'"),
    )
    for sent, name, said in cases:
        code, _, answer = call(app, "PUT", at(name), sent)
        assert code == 400, answer
        assert said in told(answer)
        assert not any(each.is_file() for each in tmp_path.glob("store/**/*")), said
    assert app.models.all() == []
    assert call(app, "PUT", at(version), body)[0] == 201


def test_a_store_that_is_full(tmp_path):
    body, _, version = upload()
    app = application(tmp_path, store=True, max_store=len(body) + 100)
    assert call(app, "PUT", at(version), headers={"Content-Length": 1 << 40}, keep_length=False)[0] == 413
    assert call(app, "PUT", at(version), body)[0] == 201
    more, _, second = upload(seed=1)
    code, _, answer = call(app, "PUT", at(second), more)
    assert (code, "DELETE some" in told(answer)) == (413, True)
    assert call(app, "DELETE", at(version))[0] == 200
    assert call(app, "PUT", at(second), more)[0] == 201


@pytest.mark.parametrize("name", ["..", "a%2fb", ".hidden", "m.bwd", "a b", "x" * 65, "-m", "ü"])
def test_names_that_are_no_names(tmp_path, name):
    app = application(tmp_path, store=True)
    body, _, version = upload()
    assert call(app, "PUT", at(version, name), body)[0] == 400


def test_versions_that_are_no_versions(tmp_path):
    app = application(tmp_path, store=True)
    for version in ("1", "ABCDEF0123456789", "0" * 17, "..", "0123456789abcdeg"):
        assert call(app, "PUT", at(version), b"x")[0] == 400


def test_a_server_that_takes_none(tmp_path):
    body, _, version = upload()
    app = application(tmp_path)
    for method in ("PUT", "DELETE"):
        assert call(app, method, at(version), body)[0] == 403
    assert call(app, "GET", at(version))[0] == 404


def test_a_slow_upload_is_cut(tmp_path):
    app = application(tmp_path, store=True, silent_seconds=0.05)
    body, _, version = upload()
    assert call(app, "PUT", at(version), pieces=[body[:9], body[9:]], pause=0.3)[0] == 408
    assert not any(each.is_file() for each in tmp_path.glob("store/**/*"))
    assert call(app, "PUT", at(version), body)[0] == 201


def test_two_at_once(tmp_path):
    app = application(tmp_path, store=True)
    body, _, version = upload()

    async def scene():
        slow = asyncio.create_task(ask(app, "PUT", at(version), pieces=[body[:9], body[9:]], pause=0.1))
        await asyncio.sleep(0.05)
        return (await ask(app, "PUT", at(version), body))[0], (await slow)[0]

    assert asyncio.run(scene()) == (409, 201)


def test_a_restart_finds_them(tmp_path):
    app = application(tmp_path, store=True)
    body, _, version = upload()
    call(app, "PUT", at(version), body)
    partial = tmp_path / "store" / "m" / ".partial-x-1"
    partial.write_bytes(b"x")
    found = list(Store(tmp_path / "store", 1 << 20).files())
    assert [(name, held) for name, held, _ in found] == [("m", version)]
    assert not partial.exists()
    assert Models(on_device(torch.device("cpu"))).load("m", found[0][2]).version == version
