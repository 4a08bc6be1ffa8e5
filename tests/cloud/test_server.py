"""The server in process: right numbers, the protocol's answers, what is refused before anything is read."""

import asyncio
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from served import answered, application, ask, infer, linear_file, request, told
from small_models import noise

from apt_model.cloud import int8g64
from apt_model.cloud.server.config import ServerConfig, bytes_of, check_public
from apt_model.cloud.server.key import Key, is_loopback
from apt_model.cloud.server.models import Models, on_device
from apt_model.core.errors import CheckpointError, ConfigError, InputError

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def held(tmp_path):
    """An application with one linear layer, and its tensors."""
    tensors = linear_file(tmp_path / "a.safetensors")
    return application(tmp_path, tmp_path / "a.safetensors"), tensors


def status(app, method, path, *args, **options):
    return asyncio.run(ask(app, method, path, *args, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (0, 16)], ids=str)
def test_the_numbers_are_those_of_the_layer(tmp_path, dtype, shape):
    tensors = linear_file(tmp_path / "a.safetensors", dtype)
    app = application(tmp_path, tmp_path / "a.safetensors")
    x = noise(*shape, seed=1).to(dtype)
    assert torch.equal(infer(app, "m0", {"x": x})["y"], F.linear(x, **tensors))


def test_without_a_bias_and_by_version(tmp_path):
    tensors = linear_file(tmp_path / "a.safetensors", bias=False)
    app = application(tmp_path, tmp_path / "a.safetensors")
    version = app.models.versions("m0")[0]
    x = noise(4, 16)
    found = infer(app, "m0", {"x": x}, path=f"/v2/models/m0/versions/{version}/infer")
    assert torch.equal(found["y"], F.linear(x, tensors["weight"]))
    assert status(app, "POST", "/v2/models/m0/versions/0123456789abcdef/infer")[0] == 404
    assert status(app, "POST", "/v2/models/other/infer")[0] == 404


def test_another_type_than_the_weights_comes_back_as_it_came(held):
    app, tensors = held
    x = noise(4, 16).half()
    assert torch.equal(infer(app, "m0", {"x": x})["y"], F.linear(x.float(), **tensors).half())


def test_numbers_in_json(held):
    app, tensors = held
    x = noise(2, 16)
    about = {"name": "x", "datatype": "FP32", "shape": [2, 16], "data": x.tolist()}
    code, headers, body = status(app, "POST", "/v2/models/m0/infer", json.dumps({"inputs": [about]}).encode())
    assert code == 200
    assert torch.allclose(answered(headers, body)["y"], F.linear(x, **tensors))
    assert json.loads(body)["outputs"][0]["shape"] == [2, 24]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_autograds(tmp_path, dtype):
    tensors = linear_file(tmp_path / "a.safetensors", dtype)
    app = application(tmp_path, tmp_path / "a.safetensors")
    x, dy = noise(3, 16, seed=1).to(dtype).requires_grad_(), noise(3, 24, seed=2).to(dtype)
    F.linear(x, **tensors).backward(dy)
    assert torch.equal(infer(app, "m0.bwd", {"x": x.detach(), "dy": dy})["dx"], x.grad)
    assert torch.equal(infer(app, "m0.bwd", {"dy": dy})["dx"], x.grad)  # it does not depend on x
    about = json.loads(status(app, "GET", "/v2/models/m0.bwd")[2])
    assert [each["optional"] for each in about["inputs"]] == [True, False]


def test_a_gradient_whose_x_did_not_come(tmp_path):
    save_file(
        {"up.weight": noise(40, 16), "down.weight": noise(8, 40)}, tmp_path / "a.safetensors",
        metadata={"kind": "mlp", "config": "{}"},
    )  # fmt: skip
    linear_file(tmp_path / "b.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for path, tensors in (("m0.bwd", {"dy": noise(2, 8)}), ("m1.bwd", {}), ("m1.bwd", {"dy": noise(2, 23)})):
        body, headers = request(tensors)
        code, _, text = status(app, "POST", f"/v2/models/{path}/infer", body, headers)
        assert (code, b"expected" in text) == (400, True), text


def test_an_mlp_and_its_gradient(tmp_path):
    tensors = {"gate.weight": noise(40, 16), "up.weight": noise(40, 16, seed=1), "down.weight": noise(8, 40, seed=2)}
    save_file(
        tensors, tmp_path / "a.safetensors", metadata={"kind": "mlp", "config": json.dumps({"activation": "silu"})}
    )
    app = application(tmp_path, tmp_path / "a.safetensors")
    x, dy = noise(5, 16).requires_grad_(), noise(5, 8)
    y = F.linear(
        F.silu(F.linear(x, tensors["gate.weight"])) * F.linear(x, tensors["up.weight"]), tensors["down.weight"]
    )
    y.backward(dy)
    assert torch.equal(infer(app, "m0", {"x": x.detach()})["y"], y)
    assert torch.allclose(infer(app, "m0.bwd", {"x": x.detach(), "dy": dy})["dx"], x.grad)


@pytest.mark.parametrize("wide", [16, 64, 100])
def test_int8_in_groups(tmp_path, wide):
    tensors = linear_file(tmp_path / "a.safetensors", wide=wide)
    app = application(tmp_path, tmp_path / "a.safetensors")
    q, scale = int8g64.pack(noise(3, wide))
    for sent in (q, F.pad(q, (0, -q.shape[-1] % 64))):
        found = infer(app, "m0", {"x_q": sent, "x_scale": scale}, wire="int8g64")
        assert found["y_q"].shape == (3, 64 if sent.shape[-1] > wide else 24)
        y = F.linear(int8g64.unpack(q, scale, wide, torch.float32), **tensors)
        got = int8g64.unpack(found["y_q"][:, :24].contiguous(), found["y_scale"], 24, torch.float32)
        assert (got - y).abs().max() <= y.abs().max() / 127
    assert "dx_q" in infer(app, "m0.bwd", {"x_q": q, "x_scale": scale, "dy": noise(3, 24)}, wire="int8g64")


def test_outputs_that_are_asked_for(held):
    app, _ = held
    path = "/v2/models/m0/infer"
    for wire, names, code in (
        ("exact", ["y"], 200), ("exact", ["y_q"], 400), ("int8g64", ["y_q", "y_scale"], 200), ("int8g64", ["y"], 400),
    ):  # fmt: skip
        message = {"inputs": [X], "outputs": [{"name": name} for name in names], "parameters": {"wire": wire}}
        message["parameters"]["binary_data_output"] = True
        assert status(app, "POST", path, json.dumps(message).encode())[0] == code, (wire, names)


def test_what_it_says_of_itself(held):
    app, _ = held
    about = json.loads(status(app, "GET", "/v2")[2])
    assert about["extensions"] == ["binary_tensor_data"]
    assert about["limits"]["max_body"] == 64 << 20
    model = json.loads(status(app, "GET", "/v2/models/m0")[2])
    assert (model["platform"], model["parameters"]["kind"]) == ("apt_model", "linear")
    assert model["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 16], "optional": False}
    version = model["versions"][0]
    assert json.loads(status(app, "GET", f"/v2/models/m0/versions/{version}")[2]) == model
    gradient = json.loads(status(app, "GET", "/v2/models/m0.bwd")[2])
    assert [each["name"] for each in gradient["inputs"]] == ["x", "dy"]
    assert gradient["outputs"][0] == {"name": "dx", "datatype": "FP32", "shape": [-1, 16], "optional": False}
    for path in ("/v2/health/live", "/v2/health/ready", "/health", "/ping", "/v2/models/m0/ready"):
        assert status(app, "GET", path)[0] == 200, path


X = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0] * 16}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [1, 15], "data": [0] * 15}, "expected a shape [..., 16], got [1, 15]"),
        ({"shape": [], "data": [0]}, "expected a shape [..., 16], got []"),
        ({"name": "z"}, "expected inputs x, got 'z'"),
        ({"datatype": "INT32"}, "expected FP16 or BF16 or FP32, got INT32"),
        ({"datatype": "UINT16"}, "expected a type of"),
    ],
)
def test_what_is_not_the_models_input(held, change, said):
    code, _, body = status(held[0], "POST", "/v2/models/m0/infer", json.dumps({"inputs": [{**X, **change}]}).encode())
    assert code == 400
    assert said in told(body)


def test_other_refusals(held):
    app, _ = held
    body = json.dumps({"inputs": [X]}).encode()
    path = "/v2/models/m0/infer"
    for change, code in (
        ({"headers": {"Content-Encoding": "gzip"}}, 415),
        ({"headers": {"Inference-Header-Content-Length": "-1"}}, 400),
        ({"headers": {"Inference-Header-Content-Length": "9" * 40}}, 400),
        ({"headers": {"X-Apt-Deadline-Ms": "soon"}}, 400),
        ({"headers": {"X-Apt-Deadline-Ms": "0"}}, 408),
        ({"headers": {"Transfer-Encoding": "chunked"}}, 411),
        ({"keep_length": False}, 411),
    ):
        assert status(app, "POST", path, body, **change)[0] == code, change
    assert status(app, "GET", path)[0] == 405
    assert status(app, "GET", path)[1]["allow"] == "POST"
    assert status(app, "POST", path, json.dumps({"inputs": []}).encode())[0] == 400
    wire = {"inputs": [X], "parameters": {"wire": "morse"}}
    assert "expected exact or int8g64" in told(status(app, "POST", path, json.dumps(wire).encode())[2])
    wanted = {"inputs": [X], "outputs": [{"name": "z"}]}
    assert status(app, "POST", path, json.dumps(wanted).encode())[0] == 400
    for missing in (
        "/v2/models",
        "/v2/models/m0/explain",
        "/v3",
        "/v2/models/m0/versions",
        "/",
        "/v2/models/m0/infer/x",
    ):
        assert status(app, "GET", missing)[0] == 404, missing


def test_what_is_too_large_is_not_read(tmp_path):
    linear_file(tmp_path / "a.safetensors", out=1 << 12, wide=1)
    app = application(tmp_path, tmp_path / "a.safetensors", max_body=1 << 16)
    code, headers, body = status(
        app, "POST", "/v2/models/m0/infer", headers={"Content-Length": 1 << 40}, keep_length=False
    )
    assert code == 413
    assert headers["connection"] == "close"
    body, head = request({"x": torch.zeros(100, 1)})
    code, _, answer = status(app, "POST", "/v2/models/m0/infer", body, head)
    assert code == 413
    assert "expected an answer of at most" in told(answer)


def test_a_slow_body_is_cut(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", silent_seconds=0.1, body_seconds=0.5)
    body = json.dumps({"inputs": [X]}).encode()
    silent = status(app, "POST", "/v2/models/m0/infer", pieces=[body[:9], body[9:]], pause=0.3)
    drop_by_drop = status(app, "POST", "/v2/models/m0/infer", pieces=[bytes([each]) for each in body], pause=0.05)
    for code, _, answer in (silent, drop_by_drop):
        assert (code, told(answer)) == (408, "the body came too slowly")
        assert len(app._readings) == 0
    assert status(app, "POST", "/v2/models/m0/infer", body)[0] == 200


def test_a_silent_body_makes_room_for_others(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", max_reading=2)
    body = json.dumps({"inputs": [X]}).encode()
    path = "/v2/models/m0/infer"

    async def scene():
        slow = [asyncio.create_task(ask(app, "POST", path, pieces=[b"", body], pause=20)) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await ask(app, "POST", path, body)
        await asyncio.sleep(0.6)
        served = await ask(app, "POST", path, body)
        cut, _ = await asyncio.wait(slow, timeout=1, return_when=asyncio.FIRST_COMPLETED)
        for task in slow:
            task.cancel()
        return refused[0], served[0], [each.result()[0] for each in cut]

    assert asyncio.run(scene()) == (429, 200, [408])


def test_more_forwards_than_may_be_in_flight(tmp_path, monkeypatch):
    import threading

    from apt_model.cloud.server import forwards as module

    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", max_inflight=2)
    go, compute = threading.Event(), module.answer
    monkeypatch.setattr(module, "is_small", lambda *_: False)
    monkeypatch.setattr(module, "answer", lambda *args, **options: (go.wait(), compute(*args, **options))[1])
    body, headers = request({"x": noise(1, 16)})

    async def scene():
        first = [asyncio.create_task(ask(app, "POST", "/v2/models/m0/infer", body, headers)) for _ in range(2)]
        await asyncio.sleep(0.05)
        code, found, _ = await ask(app, "POST", "/v2/models/m0/infer", body, headers)
        go.set()
        return code, found["retry-after"], [(await each)[0] for each in first]

    assert asyncio.run(scene()) == (429, "1", [200, 200])
    assert app.metrics.inflight == 0


@pytest.mark.parametrize(("small", "once", "repeated"), [(True, 4, 0), (False, 1, 3)])
def test_a_repeated_request_is_computed_once_where_that_takes_time(held, monkeypatch, small, once, repeated):
    from apt_model.cloud.server import forwards as module

    app, _ = held
    calls, compute = [], module.answer
    monkeypatch.setattr(module, "is_small", lambda *_: small)
    monkeypatch.setattr(module, "answer", lambda *args, **options: (calls.append(1), compute(*args, **options))[1])
    x = noise(2, 16)

    async def scene(body, headers, count):
        return await asyncio.gather(*(ask(app, "POST", "/v2/models/m0/infer", body, headers) for _ in range(count)))

    asyncio.run(scene(*request({"x": x}, id="a"), 1))
    first = asyncio.run(scene(*request({"x": x}, id="a"), 3))
    assert (len(calls), app.metrics.repeated) == (once, repeated)
    assert len({answer for _, _, answer in first}) == 1
    other = asyncio.run(scene(*request({"x": x + 1}, id="a"), 1))  # another request that took the same id
    assert len(calls) == once + 1
    assert other[0][2] != first[0][2]
    asyncio.run(scene(*request({"x": x}), 2))
    assert len(calls) == once + 3


def test_what_is_kept_is_bounded(tmp_path, monkeypatch):
    from apt_model.cloud.server import forwards as module

    monkeypatch.setattr(module, "is_small", lambda *_: False)
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", max_cached=2000)
    for number in range(50):
        infer(app, "m0", {"x": noise(1, 16)}, id=str(number))
    assert 0 < app.forwards._answers._held <= 2000
    assert app.forwards._answers._held == sum(each.nbytes for each in app.forwards._answers._entries.values())


# --- whom it serves

CANARY = "canary-7f3a91"


def test_the_key(tmp_path, caplog):
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", key=Key(CANARY))
    caplog.set_level(logging.DEBUG)
    good = ({"Authorization": f"Bearer {CANARY}"}, {"X-Auth-Token": CANARY}, {"authorization": f"bearer  {CANARY}"})
    bad = ({}, {"Authorization": CANARY}, {"Authorization": f"Bearer {CANARY}x"}, {"Salad-Api-Key": CANARY},
           {"X-Auth-Token": ""}, {"Authorization": "Bearer \xff"})  # fmt: skip
    for headers in good:
        assert status(app, "GET", "/v2/models/m0", headers=headers, client="203.0.113.9")[0] == 200, headers
    told_all = []
    for headers in bad:
        for method, path in (("GET", "/v2"), ("GET", "/metrics"), ("POST", "/v2/models/m0/infer"), ("PUT", "/x")):
            code, found, answer = status(app, method, path, b"x" * 99, headers)
            assert code == 401, (headers, path)
            told_all += [answer.decode(), str(found)]
    for path in ("/health", "/ping", "/v2/health/live", "/v2/health/ready"):
        assert status(app, "GET", path)[0] == 200
    metrics = status(app, "GET", "/metrics", headers=good[0])[2].decode()
    seen = [*told_all, metrics, repr(app.config), str(app.config), repr(app.config.key), caplog.text]
    assert all(CANARY not in each for each in seen)


def test_the_key_is_asked_for_before_a_body_is_read(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", key=Key(CANARY))
    code, headers, _ = status(
        app, "POST", "/v2/models/m0/infer", headers={"Content-Length": 1 << 25}, keep_length=False, pieces=[]
    )
    assert (code, headers["connection"]) == (401, "close")


def test_without_a_key_only_this_machine_is_served(held):
    app, _ = held
    for client in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert status(app, "GET", "/v2", client=client)[0] == 200
    assert status(app, "GET", "/v2", client="203.0.113.9")[0] == 403
    for host, code in (("localhost:8080", 200), ("[::1]:8080", 200), ("evil.example", 403)):
        assert status(app, "GET", "/v2", headers={"Host": host})[0] == code
    open_app = ServerConfig(open_to_all=True)
    assert open_app.serves("203.0.113.9", "evil.example")
    for host in ("0.0.0.0", "::", "gpu.example"):  # noqa: S104
        with pytest.raises(ConfigError, match="there is no key"):
            check_public(host, ServerConfig())
        check_public(host, ServerConfig(key=Key("k")))
        check_public(host, ServerConfig(open_to_all=True))
    assert not is_loopback(None)


def test_metrics_hold_no_text_of_clients(held):
    app, _ = held
    for path in ("/v2/models/evil%22/infer", '/v2/models/evil"}/infer', "/evil", "/v2/models/evil/ready"):
        assert status(app, "GET", path)[0] in (404, 405)
    infer(app, "m0", {"x": noise(1, 16)})
    metrics = status(app, "GET", "/metrics")[2].decode()
    assert "evil" not in metrics
    assert 'apt_requests_total{model="m0",status="200"} 1' in metrics
    assert 'apt_request_seconds_count{model="m0"} 1' in metrics


# --- what may be served


def test_files_that_are_no_block(tmp_path):
    models = Models(on_device(torch.device("cpu")))
    path = tmp_path / "a.safetensors"
    cases = (
        ({"weight": noise(2, 3, 4)}, "linear", {}, "expected a weight"),
        ({"weight": noise(2, 3), "more": noise(1)}, "linear", {}, "unknown"),
        ({"weight": noise(2, 3), "bias": noise(3)}, "linear", {}, "expected bias"),
        ({"weight": noise(2, 3).double()}, "linear", {}, "expected FP16"),
        ({"weight": noise(2, 3), "bias": noise(2).half()}, "linear", {}, "of one type"),
        ({"weight": noise(2, 3)}, "linear", {"quantize": "nvfp4"}, "this server has not"),
        ({"weight": noise(2, 3)}, "linear", {"quantize": "int3"}, "nvfp4 or mxfp4"),
        ({"weight": noise(2, 3)}, "linear", {"code": "import os"}, "has no option 'code'"),
        ({"weight": noise(2, 3)}, "os.system", {}, "expected a block of"),
        ({"up.weight": noise(2, 3), "down.weight": noise(3, 4)}, "mlp", {}, "follow each other"),
        ({"up.weight": noise(2, 3), "down.weight": noise(3, 2)}, "mlp", {"activation": []}, "mlp.activation"),
    )
    for tensors, kind, config, said in cases:
        save_file(tensors, path)
        with pytest.raises((InputError, ConfigError), match=said):
            models.load("m", path, {"kind": kind, "config": config})
    with pytest.raises(CheckpointError, match="__metadata__"):
        models.load("m", path)
    assert models.all() == []


def test_a_version_follows_from_weights_and_configuration(tmp_path):
    models = Models(on_device(torch.device("cpu")))
    seen = set()
    for number, (seed, dtype) in enumerate([(0, torch.float32), (1, torch.float32), (0, torch.float16)]):
        linear_file(tmp_path / f"{number}.safetensors", dtype, seed=seed)
        seen.add(models.load("m", tmp_path / f"{number}.safetensors").version)
    assert len(seen) == 3
    linear_file(tmp_path / "again.safetensors", about=False)
    again = models.load("m", tmp_path / "again.safetensors", {"kind": "linear", "config": {}})
    assert again.version == models.versions("m")[0]


def test_sizes():
    assert [bytes_of(each, "--x") for each in ("64MiB", "12MB", "1 kib", "7")] == [64 << 20, 12_000_000, 1024, 7]
    for text in ("", "MiB", "-1", "0", "1TBx", "1e3"):
        with pytest.raises(ConfigError, match="--x: expected a size"):
            bytes_of(text, "--x")
