"""Our client over TLS to a server in a process of its own: whom it trusts, and what it says where it does not."""

import contextlib
import datetime as dt
import re
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
import torch
import trustme
from clouds import CANARY, bearer, counts, reference
from served import ROOT

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.http_transport import HttpTransport
from apt_model.cloud.transport import Request
from apt_model.core.errors import CloudError, RefusedError
from apt_model.optimization import CloudNPULinear

KEY = CANARY * 2
SERVER = """
import pathlib, socket, sys
import uvicorn
from served import application
from apt_model.cloud.server.key import Key

app = application(pathlib.Path(sys.argv[1]), store=True, key=Key(sys.argv[3]))
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
config = uvicorn.Config(app, ssl_certfile=sys.argv[2], ssl_keyfile=sys.argv[2], log_level="info", lifespan="off")
uvicorn.Server(config).run(sockets=[listener])
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A private authority, and the file of its certificate."""
    made = trustme.CA()
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    made.cert_pem.write_to_path(path)
    return made, path


@contextlib.contextmanager
def serving(tmp_path, certificate):
    """uvicorn with our application behind this certificate: its port, and what it logged."""
    pem = tmp_path / "server.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(pem)
    log = tmp_path / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, tmp_path, pem, KEY], stdout=written, stderr=subprocess.STDOUT, cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/cloud"},
        )  # fmt: skip
        try:
            while not (match := re.search(r"port (\d+)\n", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            yield int(match[1]), log
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture
def served(tmp_path, authority):
    with serving(tmp_path, authority[0].issue_cert("localhost", "127.0.0.1")) as found:
        yield found


def trusting(path):
    return ssl.create_default_context(cafile=path)


def get(transport):
    try:
        return transport.send(Request(method="GET", path="/v2"), timeout=20)
    finally:
        transport.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_trusted_authority(served, authority, host):
    port, log = served
    backend = OIPBackend(
        [HttpTransport(f"https://{host}:{port}", auth=bearer(KEY), context=trusting(authority[1]))]
    )  # fmt: skip
    try:
        layer = CloudNPULinear(64, 8, cloud_backend=backend, fallback_local=False)
        for rows in (3, 20_000):  # 5 MB: many records of TLS
            x = torch.randn(rows, 64)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), reference(layer, x))
        assert counts(layer) == (2, 0, 0)
        assert log.read_text().count("/infer HTTP/1.1") == 2
        assert backend.client.endpoints[0].transport.open_connections == 1  # kept: one handshake
    finally:
        backend.close()


def test_the_remedy_of_the_error_works(served, authority, monkeypatch):
    """A private authority's certificate in SSL_CERT_FILE, as the error says."""
    port, _ = served
    with pytest.raises(RefusedError, match="SSL_CERT_FILE"):
        get(HttpTransport(f"https://localhost:{port}", auth=bearer(KEY)))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority[1]))
    assert get(HttpTransport(f"https://localhost:{port}", auth=bearer(KEY))).status == 200


def refused(url, log, context, said, remedy):
    """The error says why and what to do; nothing was asked, and the key is in no word of it."""
    with pytest.raises(RefusedError, match="certificate cannot be trusted") as caught:
        get(HttpTransport(url, auth=bearer(KEY), context=context))
    assert said in str(caught.value)
    assert remedy in caught.value.remedy
    assert KEY not in str(caught.value)
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    assert "HTTP/1.1" not in log.read_text()


def test_an_unknown_authority_is_refused(served, tmp_path):
    port, log = served
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    for context in (None, trusting(other)):
        refused(f"https://localhost:{port}", log, context, "local issuer certificate", "SSL_CERT_FILE")


def test_another_hosts_certificate_is_refused(tmp_path, authority):
    with serving(tmp_path, authority[0].issue_cert("elsewhere.example")) as (port, log):
        refused(f"https://localhost:{port}", log, trusting(authority[1]), "not valid for 'localhost'", "for this name")
        refused(f"https://127.0.0.1:{port}", log, trusting(authority[1]), "127.0.0.1", "for this name")


def test_a_certificate_that_has_run_out_is_refused(tmp_path, authority):
    ended = dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=1)
    with serving(tmp_path, authority[0].issue_cert("localhost", not_after=ended)) as (port, log):
        refused(f"https://localhost:{port}", log, trusting(authority[1]), "certificate has expired", "clock")


def test_a_refused_certificate_is_asked_once_and_computed_here(served):
    port, log = served
    backend = OIPBackend([HttpTransport(f"https://localhost:{port}", auth=bearer(KEY))])
    try:
        assert not backend.health().ok
        assert "cannot be trusted" in backend.health().why
        layer = CloudNPULinear(8, 4, cloud_backend=backend)
        x = torch.randn(2, 8)
        assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (0, 1, 0)
        assert "HTTP/1.1" not in log.read_text()
    finally:
        backend.close()


def test_a_port_without_tls_is_an_error_of_ours():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        port = listener.getsockname()[1]
        transport = HttpTransport(f"https://localhost:{port}", connect_timeout=5)

        def plain():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=plain)
        thread.start()
        with pytest.raises(CloudError, match="cannot be reached: SSLError"):
            get(transport)
        thread.join()
