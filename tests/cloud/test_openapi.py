"""What our server answers, held against the protocol's OpenAPI description; see peers/README.md for its source."""

import asyncio
import copy
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from served import application, ask, linear_file

from apt_model.cloud import wire
from apt_model.cloud.server.key import Key
from apt_model.cloud.tensors import to_wire

JSON = {"Content-Type": "application/json"}


def described():
    """The description, mended in the two places that its README names."""
    found = json.loads((Path(__file__).parent / "peers" / "dataplane.json").read_text(encoding="utf-8"))
    found["components"]["schemas"]["TensorData"]["oneOf"].remove({"type": "bytes"})
    found["components"]["enums"]["Datatype"]["enum"].append("BF16")
    return found


DESCRIPTION = described()
_ERRORS = ("MetadataServerErrorResponse", "MetadataModelErrorResponse", "InferenceErrorResponse")


def check(schema, value):
    """Whether `value` is what the description says; `jsonschema.ValidationError` where it is not."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DESCRIPTION["components"]}
    jsonschema.Draft4Validator(whole).validate(value)


def schema_of(path, method, status):
    """The name of what an operation answers with a status; None where that has no body."""
    answers = DESCRIPTION["paths"][path][method]["responses"]
    content = answers[str(status)].get("content", {}).get("application/json")
    return content["schema"]["$ref"].rpartition("/")[2] if content else None


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openapi")
    linear_file(folder / "a.safetensors")
    linear_file(folder / "b.safetensors", torch.bfloat16)
    return application(folder, folder / "a.safetensors", folder / "b.safetensors")


def asked(app, method, path, body=b"", headers=()):
    status, found, answer = asyncio.run(ask(app, method, path, body, headers))
    assert found["content-type"] == "application/json"
    return status, json.loads(answer)


def version(app, model):
    return asked(app, "GET", f"/v2/models/{model}")[1]["versions"][0]


def infer_body(**changes):
    x = {"name": "x", "datatype": "FP32", "shape": [2, 16], "data": [[0.5] * 16] * 2}
    return {"id": "42", "inputs": [x], "outputs": [{"name": "y"}], **changes}


GETS = [path for path, calls in DESCRIPTION["paths"].items() if "get" in calls]
INFERS = [path for path, calls in DESCRIPTION["paths"].items() if path.endswith("/infer") and "post" in calls]


@pytest.mark.parametrize("path", GETS)
@pytest.mark.parametrize("model", ["m0", "m1"])
def test_every_get_of_the_description(app, path, model):
    real = path.replace("{model_name}", model).replace("{model_version}", version(app, model))
    status, found = asked(app, "GET", real)
    assert status == 200
    schema = schema_of(path, "get", 200)
    if schema is not None:
        check(schema, found)


@pytest.mark.parametrize("path", INFERS)
def test_inference(app, path):
    sent = infer_body()
    check("InferenceRequest", sent)
    real = path.replace("{model_name}", "m0").replace("{model_version}", version(app, "m0"))
    status, found = asked(app, "POST", real, json.dumps(sent).encode(), JSON)
    assert status == 200
    check(schema_of(path, "post", 200), found)
    (y,) = found["outputs"]
    assert (found["id"], found["model_name"], y["name"], y["shape"]) == ("42", "m0", "y", [2, 24])
    assert len(y["data"]) == 48


def test_what_our_client_asks_in_json():
    tensors = (to_wire("x", torch.randn(2, 3)), to_wire("position_ids", torch.arange(3)))
    parts, _ = wire.encode_request(wire.Message(tensors=tensors, id="1", wanted=("y",)), plain=True)
    check("InferenceRequest", json.loads(parts[0]))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v2/models/m0/infer", infer_body(inputs=[]), 400),
        ("POST", "/v2/models/m0/infer", infer_body(outputs=[{"name": "z"}]), 400),
        ("POST", "/v2/models/m0/infer", [], 400),
        ("POST", "/v2/models/none/infer", infer_body(), 404),
        ("POST", "/v2/models/m0/versions/0000000000000000/infer", infer_body(), 404),
        ("POST", "/v2/models/m0", {}, 405),
        ("GET", "/v2/models/none", None, 404),
        ("GET", "/v2/models/m0/versions/0000000000000000", None, 404),
        ("GET", "/v2/models/none/ready", None, 404),
        ("GET", "/v2/none", None, 404),
    ],
)
def test_errors(app, method, path, body, status):
    sent = b"" if body is None else json.dumps(body).encode()
    found = asked(app, method, path, sent, JSON if body is not None else ())
    assert found[0] == status
    for schema in _ERRORS:
        check(schema, found[1])
    assert found[1].keys() == {"error"}
    assert found[1]["error"]


def test_errors_before_anything_is_read(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    locked = application(tmp_path, tmp_path / "a.safetensors", key=Key("k" * 32))
    for path, schema in (("/v2", _ERRORS[0]), ("/v2/models/m0", _ERRORS[1]), ("/v2/models/m0/infer", _ERRORS[2])):
        status, found = asked(locked, "POST" if path.endswith("infer") else "GET", path)
        assert status == 401
        check(schema, found)
    locked.models.loading.add("m1")
    status, found = asked(locked, "GET", "/v2/health/ready")
    assert status == 503
    check(_ERRORS[0], found)


def test_the_readiness_answers_that_the_text_has_and_the_description_has_not(app):
    """Server live and ready: {"live": bool}; model ready: {"name": string, "ready": bool}."""
    assert asked(app, "GET", "/v2/health/live")[1] == {"live": True}
    assert asked(app, "GET", "/v2/health/ready")[1] == {"live": True, "ready": True}
    assert asked(app, "GET", "/v2/models/m1/ready")[1] == {"name": "m1", "ready": True}
    assert asked(app, "GET", "/v2/models/m1.bwd/ready")[1] == {"name": "m1.bwd", "ready": True}


def _without(value, key):
    return {name: each for name, each in value.items() if name != key}


def test_the_check_can_fail(app):
    about, model = asked(app, "GET", "/v2")[1], asked(app, "GET", "/v2/models/m0")[1]
    answer = asked(app, "POST", "/v2/models/m0/infer", json.dumps(infer_body()).encode(), JSON)[1]
    wrong = [("MetadataServerResponse", _without(about, each)) for each in ("name", "version", "extensions")]
    wrong += [("MetadataModelResponse", _without(model, each)) for each in ("name", "platform")]
    wrong += [("InferenceResponse", _without(answer, each)) for each in ("model_name", "outputs")]
    wrong += [("MetadataServerResponse", {**about, "extensions": [1]}), ("InferenceErrorResponse", {"error": 5})]
    for key, value in (("shape", ["-1"]), ("datatype", "FP8"), ("name", None)):
        changed = copy.deepcopy(model)
        changed["inputs"][0][key] = value
        wrong.append(("MetadataModelResponse", changed))
    changed = copy.deepcopy(answer)
    del changed["outputs"][0]["data"]
    for schema, value in [*wrong, ("InferenceResponse", changed)]:
        with pytest.raises(jsonschema.ValidationError):
            check(schema, value)
