"""How a server of the protocol is spoken to: with binary tensors or in JSON alone, and where it holds our weights.

`apt-model serve` has binary tensors, a repository of weights, and versions that are digests. Others have what their
metadata says: MLServer 1.7 has JSON alone, KServe's Python server does not announce more and has no versions in paths.
In JSON floats travel as FP32, which holds every fp16 and bf16 exactly and which every server knows; BF16 has no JSON.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from apt_model.cloud import wire
from apt_model.cloud.client import Client, Tally
from apt_model.cloud.deadline import Deadline
from apt_model.cloud.int8g64 import GROUP
from apt_model.cloud.tensors import ACTIVATIONS, DTYPES, from_wire, to_wire
from apt_model.cloud.transport import OVERHEAD, Request, Response
from apt_model.core.errors import RefusedError, WireError

EXTENSION = "binary_tensor_data"
_JSON_BYTES = 32
"""Of a number: a double has at most 24 letters; a comma, brackets and spaces."""


class Dialect(NamedTuple):
    """What a server's metadata says of it."""

    binary: bool = True
    """It has the extension of binary tensors."""
    own: bool = True
    """It is `apt-model serve`: it has our repository and wires, and tells its limits."""

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Self:
        """From the answer of /v2."""
        extensions = about.get("extensions")
        binary = isinstance(extensions, list) and EXTENSION in extensions
        return cls(binary=binary, own=binary and isinstance(about.get("limits"), Mapping))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of an element on the way, at most."""
        return dtype.itemsize if self.binary else _JSON_BYTES


class Inference(NamedTuple):
    """An `infer`: what is sent, and what must come back."""

    request: Request
    identity: str
    outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    dialect: Dialect

    @classmethod
    def of(
        cls,
        path: str,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        dialect: Dialect,
        parameters: Mapping[str, Any],
        identity: str | None,
    ) -> Self:
        """One that is ready to go.

        Args:
            path: of the model.
            inputs: by name.
            outputs: name -> type and shape that must come back.
            dialect: of the server.
            parameters: of the request.
            identity: of the forward; None makes one.
        """
        identity = identity or os.urandom(16).hex()
        message = wire.Message(
            tensors=tuple(to_wire(name, each if dialect.binary else _plain(each)) for name, each in inputs.items()),
            id=identity, parameters=parameters, wanted=tuple(outputs),
        )  # fmt: skip
        parts, length = wire.encode_request(message, plain=not dialect.binary)
        headers = {"Content-Type": "application/json"}
        if dialect.binary:
            headers = {"Content-Type": "application/octet-stream", wire.HEADER_LENGTH: str(length)}
        most = OVERHEAD
        for dtype, shape in outputs.values():
            # int8g64 may come in whole groups.
            most += (math.prod(shape) + GROUP * math.prod(shape[:-1])) * dialect.nbytes(dtype)
        request = Request("POST", f"{path}/infer", headers, parts, most)
        return cls(request, identity, outputs, dialect)

    def read(self, response: Response, who: str) -> dict[str, Tensor]:
        """The outputs by name; `WireError` where the answer is another one."""
        limits = wire.Limits(body_bytes=self.request.most, json_bytes=OVERHEAD)
        answer = wire.decode_response(response.body, _json_length(response.headers), limits)
        if answer.id not in (None, self.identity):
            raise WireError(f"{who}: expected the answer to {self.identity}, got another request's")
        found = {each.name: each for each in answer.tensors}
        return {name: self._output(found, name, dtype, shape) for name, (dtype, shape) in self.outputs.items()}

    def _output(
        self, found: Mapping[str, wire.WireTensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        came = DTYPES.get(found[name].datatype) if name in found and not self.dialect.binary else None
        if came is not None and came.is_floating_point and dtype in ACTIVATIONS:
            return from_wire(found, name, came, shape).to(dtype)
        return from_wire(found, name, dtype, shape)


def path_of(model: str, version: str) -> str:
    """Where a model is."""
    return f"/v2/models/{model}/versions/{version}"


def find_path(
    client: Client, model: str, version: str, deadline: Deadline, *, tally: Tally | None, patience: float
) -> str:
    """Where another's server holds these weights: as MODEL-VERSION, where it has no versions, or as a version of MODEL.

    Raises:
        RefusedError: it holds them under neither name.
        CloudError: as `Client.ask`.
    """
    named = f"/v2/models/{model}-{version}"

    def is_ready(path: str) -> bool:
        request = Request(method="GET", path=f"{path}/ready")
        return client.ask(request, deadline, tally=tally, patience=patience).status == 200

    if is_ready(named):
        return named
    try:
        if is_ready(path_of(model, version)):
            return path_of(model, version)
    except RefusedError:  # KServe's server answers 501 to every version
        pass
    raise RefusedError(
        f"{client.endpoints[0].transport.name}: it is not apt-model serve, takes no weights from here, and holds "
        f"neither version {version} of {model} nor a model {model}-{version}",
        remedy="give it these weights under one of these names, or start apt-model serve there",
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in ACTIVATIONS else tensor


def _json_length(headers: Mapping[str, str]) -> int | None:
    value = headers.get(wire.HEADER_LENGTH.lower())
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 12:
        raise WireError(f"expected {wire.HEADER_LENGTH} to be a number, got something else")
    return int(value)
