"""Requests that are wrong, from a seed: whatever is sent, a server refuses it, and none of it is its own fault."""

import json
import random
import struct

HEADER = "Inference-Header-Content-Length"
PATH = "/v2/models/model/infer"


def hostile(seed, *, wide=16, path=PATH):
    """One request that no server may accept: its bytes, and its kind."""
    draw = random.Random(seed)
    kind = draw.choice(sorted(_KINDS))
    return _KINDS[kind](draw, wide, path), kind


def _raw(path, body, headers=(), method="POST", length=None):
    named = {"Host": "localhost", "Content-Length": len(body) if length is None else length, **dict(headers)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def _binary(path, about, data, **options):
    text = json.dumps({"inputs": about} if isinstance(about, list) else about).encode()
    return _raw(path, text + data, {HEADER: len(text)}, **options)


def _x(wide, **change):
    return {"name": "x", "datatype": "FP32", "shape": [1, wide], "parameters": {"binary_data_size": 4 * wide}, **change}


def _shape(draw, wide, path):
    bad = (
        [2**40, 2**40],
        [-1, wide],
        [1, wide, 1],
        [wide + 1],
        [],
        [0.5, wide],
        ["1", wide],
        None,
        [1] * 40,
        [True, wide],
        [2**64, wide],
        [1, [wide]],
        {"0": 1},
    )
    return _binary(path, [_x(wide, shape=draw.choice(bad))], bytes(4 * wide))


def _datatype(draw, wide, path):
    bad = ("BYTES", "FP8", "fp32", None, 7, ["FP32"], "INT64", "x" * 1000, "UINT64")
    return _binary(path, [_x(wide, datatype=draw.choice(bad))], bytes(4 * wide))


def _size(draw, wide, path):
    bad = (0, 1, -1, 4 * wide - 1, 4 * wide + 1, 2**62, 1e3, "64", None, True)
    return _binary(path, [_x(wide, parameters={"binary_data_size": draw.choice(bad)})], bytes(4 * wide))


def _rest(draw, wide, path):
    return _binary(path, [_x(wide)], bytes(draw.choice((0, 1, 4 * wide - 1, 4 * wide + 1, 5000))))


def _name(draw, wide, path):
    bad = ("", "y", "dy", "x" * 300, None, 5, "x\u0000", "\ud800", "../x", "x_q")
    return _binary(path, [_x(wide, name=draw.choice(bad))], bytes(4 * wide))


def _count(draw, wide, path):
    many = draw.choice((0, 2, 17, 200))
    return _binary(path, [_x(wide)] * many, bytes(4 * wide * many))


def _head_length(draw, wide, path):
    text = json.dumps({"inputs": [_x(wide)]}).encode()
    bad = (
        0,
        1,
        len(text) - 1,
        len(text) + 1,
        10**9,
        10**30,
        "-1",
        "1e2",
        "",
        "0x10",
        " ",
        "٣".encode().decode("latin-1"),
    )
    return _raw(path, text + bytes(4 * wide), {HEADER: draw.choice(bad)})


def _json(draw, _wide, path):
    bad = (
        b"[" * 3000,
        b"{" * 50,
        b"\xff\xfe",
        b"NaN",
        b'{"inputs":Infinity}',
        b"1" * 5000,
        b'{"a":' * 900,
        b"null",
        b"{}",
        b'"x"',
        b'{"inputs":{}}',
        b'{"inputs":[1]}',
        b"\x00" * 100,
        b"",
    )
    text = draw.choice(bad)
    return _raw(path, text, draw.choice(({}, {HEADER: len(text)})))


def _numbers(draw, wide, path):
    bad = (
        [0] * (wide - 1),
        [0] * (wide + 1),
        ["0"] * wide,
        [None] * wide,
        [1e999] * wide,
        [[0] * wide] * 2,
        5,
        "0" * wide,
        [True] * wide,
        [[[[[0]]]]] * wide,
    )
    about = {"name": "x", "datatype": "FP32", "shape": [1, wide], "data": draw.choice(bad)}
    return _raw(path, json.dumps({"inputs": [about]}).encode())


def _bits(draw, wide, path):
    """A sound message in which the JSON's bytes are changed."""
    text = bytearray(json.dumps({"inputs": [_x(wide)]}).encode())
    while True:
        changed = bytearray(text)
        for _ in range(draw.randint(1, 6)):
            changed[draw.randrange(len(changed))] = draw.choice(b'{}[]",:x-\x00\xff')
        try:
            if json.loads(changed).get("inputs") != [_x(wide)]:
                break
        except (ValueError, AttributeError):
            break
    return _raw(path, bytes(changed) + bytes(4 * wide), {HEADER: len(changed)})


def _length(draw, wide, path):
    bad = (None, -1, "x", "1, 2", 2**40, 2**70, "+5", "0x10", (1 << 26) + 1)
    return _raw(path, bytes(4 * wide), {HEADER: 5}, length=draw.choice(bad))


def _short(draw, wide, path):
    """Announces more than it sends, and waits."""
    text = json.dumps({"inputs": [_x(wide)]}).encode()
    sent = text[: draw.randrange(len(text))]
    return _raw(path, sent, {HEADER: len(text)}, length=draw.choice((len(text) + 4 * wide, 1 << 20, 1 << 26)))


def _chunked(draw, _wide, path):
    body = draw.choice((b"5\r\nabcde\r\n0\r\n\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"xyz\r\n"))
    return _raw(path, body, {"Transfer-Encoding": "chunked", "Content-Length": None})


def _line(draw, _wide, path):
    bad = (
        b"\x16\x03\x01" + bytes(200) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        f"POST {path} HTTP/3.7\r\n\r\n".encode(),
        b"\r\n" * 50 + b"x y\r\n\r\n",
        b"BREW /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"POST {path} HTTP/1.1\r\nX: y\x00z\r\n\r\n".encode(),
        f"POST {path} HTTP/1.1\r\n: empty\r\n\r\n".encode(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 9),
    )
    return draw.choice(bad)


def _path(draw, wide, path):
    bad = (
        "/v2/models/../../etc/passwd/infer",
        "/v2/models/%2e%2e/infer",
        "/v2/models/model/versions/0000/infer",
        "/v2/models//infer",
        "/v2/models/" + "m" * 5000 + "/infer",
        f"{path}/more",
        "/v2/repository/models/m/versions/x",
        "/%ff",
        "//",
        f"{path}?x=%00/..%2f",
    )
    chosen = draw.choice(bad[:-1])
    return _binary(chosen, [_x(wide)], bytes(4 * wide))


def _method(draw, _wide, path):
    return _raw(path, b"", method=draw.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")))


def _upload(draw, _wide, _path):
    """A server without --allow-upload, or weights that are none."""
    body = draw.choice((b"", bytes(64), struct.pack("<Q", 2**40), struct.pack("<Q", 8) + b'{"a":{}}'))
    return _raw("/v2/repository/models/m/versions/0123456789abcdef", body, method="PUT")


_KINDS = {
    function.__name__.strip("_"): function
    for function in (
        _shape, _datatype, _size, _rest, _name, _count, _head_length, _json, _numbers, _bits, _length, _short,
        _chunked, _line, _path, _method, _upload,
    )
}  # fmt: skip
KINDS = tuple(sorted(_KINDS))
