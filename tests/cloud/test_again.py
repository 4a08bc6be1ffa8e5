"""Short forwards that are asked for again and again: right numbers each time, whatever is kept for them."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from served import answered, application, linear_file, request
from small_models import noise
from torch import nn

from apt_model.cloud.server import again
from apt_model.cloud.server.heads import Headers
from apt_model.cloud.wire import HEADER_LENGTH

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def at_once(app, tensors, model="m0", **options):
    """What the short way says to these: id and outputs; None where it leaves them to the usual way."""
    body, named = request(tensors, **options)
    headers = [(b"content-length", b"%d" % len(body)), (b"host", b"localhost")]
    headers += [(name.lower().encode(), str(value).encode()) for name, value in named.items()]
    made = []
    path = f"/v2/models/{model}/infer"
    if not app.at_once(path, Headers(headers), "127.0.0.1", body, made.append):
        assert not made
        return None
    ((parts, length),) = made
    text = b"".join(parts)  # before the next is asked for
    return json.loads(text[:length])["id"], answered({HEADER_LENGTH.lower(): str(length)}, text)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_has_its_own_id_and_numbers(tmp_path, dtype):
    tensors = linear_file(tmp_path / "a.safetensors", dtype)
    app = application(tmp_path, tmp_path / "a.safetensors")
    ids = ["a", "y", "m0", "FP32", "x" * 64, "7", "outputs", "0123456789abcdef" * 2]
    for number, name in enumerate(ids):
        x = noise(3, 16, seed=number).to(dtype)
        identity, found = at_once(app, {"x": x}, id=name)
        assert identity == name
        assert torch.equal(found["y"], F.linear(x, **tensors))
    (model,) = app.models.all()
    assert 0 < len(model.again) < len(ids)  # other lengths are filled up otherwise; what stands twice is not kept
    kept = set()
    for number in range(10):
        at_once(app, {"x": noise(3, 16)}, id=f"{number:064}")
        kept.add(len(model.again))
    assert len(kept) == 1


def test_what_is_kept_is_one_layout_s_and_one_model_s(tmp_path):
    one = linear_file(tmp_path / "a.safetensors")
    two = linear_file(tmp_path / "b.safetensors", seed=1)
    app = application(tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for turn in range(3):
        for rows in (1, 2, 3):
            for name, tensors in (("m0", one), ("m1", two)):
                x = noise(rows, 16, seed=turn)
                assert torch.equal(at_once(app, {"x": x}, name, id=str(turn))[1]["y"], F.linear(x, **tensors))
    assert [len(model.again) for model in app.models.all()] == [3, 3]


def test_a_model_that_is_gone_is_not_asked(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors")
    x = {"x": noise(2, 16)}
    assert at_once(app, x, id="1") is not None
    (model,) = app.models.all()
    app.models.drop("m0", model.version)
    assert at_once(app, x, id="2") is None


def test_many_layouts_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(again, "_MOST", 4)
    tensors = linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors")
    (model,) = app.models.all()
    for rows in [*range(1, 11), *range(1, 11)]:
        x = noise(rows, 16)
        assert torch.equal(at_once(app, {"x": x}, id="1")[1]["y"], F.linear(x, **tensors))
        assert 1 <= len(model.again) <= 4


def test_what_is_looked_at_each_time_is_not_kept(tmp_path):
    """Requests without an id, in 8 bits, and gradients are answered at once, and nothing is kept for them."""
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors")
    (model,) = app.models.all()
    q = {"x_q": torch.ones(2, 16, dtype=torch.int8), "x_scale": torch.ones(2, 1).half()}
    for _ in range(2):
        assert at_once(app, q, id="1", wire="int8g64") is not None
        assert at_once(app, {"dy": noise(2, 24)}, "m0.bwd", id="1") is not None
    assert not model.again
    assert at_once(app, {"x": noise(2, 16)}, id="1", binary=False) is None


def test_numbers_after_a_refusal(tmp_path):
    tensors = linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors")
    x = noise(2, 16)
    for _ in range(2):
        assert at_once(app, {"x": noise(2, 17)}, id="1") is None
        assert at_once(app, {"x": x.double()}, id="1") is None
        assert torch.equal(at_once(app, {"x": x}, id="1")[1]["y"], F.linear(x, **tensors))


def test_a_block_that_hands_its_input_on(tmp_path):
    save_file(
        {"up.weight": torch.eye(16), "down.weight": torch.eye(16)}, tmp_path / "a.safetensors",
        metadata={"kind": "mlp", "config": '{"activation": "relu"}'},
    )  # fmt: skip
    app = application(tmp_path, tmp_path / "a.safetensors")
    (model,) = app.models.all()
    model.block.module = nn.Identity()
    for number in range(3):
        x = noise(2, 16, seed=number)
        assert torch.equal(at_once(app, {"x": x}, id=str(number))[1]["y"], x)
    model.block.module = nn.ReLU(inplace=True)
    for number in range(3):
        x = noise(2, 16, seed=number)
        assert torch.equal(at_once(app, {"x": x}, id=str(number))[1]["y"], x.relu())
