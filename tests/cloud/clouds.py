"""What the tests of clouds share."""

import contextlib
import threading

import torch

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.client import Client, Retry
from apt_model.cloud.fake import FakeServer
from apt_model.cloud.fake_http import serving
from apt_model.cloud.http_transport import HttpTransport
from apt_model.cloud.secret import Auth, Secret
from apt_model.cloud.transport import InProcess

CANARY = "canary-5e1f0e77c0ffee"


class Clock:
    """Seconds that pass when told, also by sleeping."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def bearer(key=CANARY):
    return Auth("Authorization", Secret(key), "Bearer ")


@contextlib.contextmanager
def in_process(*fakes, retry=None, **options):
    """A backend over fakes in this process, where nothing is late: what is computed elsewhere follows from the test."""
    fakes = fakes or (FakeServer(),)
    auths = [bearer(each.key) if getattr(each, "key", None) else None for each in fakes]
    transports = [InProcess(each, auth=auth) for each, auth in zip(fakes, auths, strict=True)]
    backend = OIPBackend(transports, client=Client(transports, retry=retry or Retry(), late=None), **options)
    try:
        yield backend
    finally:
        backend.close()


@contextlib.contextmanager
def over_http(fake=None, **options):
    """The fake, what serves it, and a backend over a socket."""
    fake = fake or FakeServer()
    with serving(fake) as served:
        backend = OIPBackend([HttpTransport(served.url, auth=bearer(fake.key) if fake.key else None)], **options)
        try:
            yield fake, served, backend
        finally:
            backend.close()


def connected(port):
    """A backend to the server at this port of this machine, closed at the end of its block."""
    return contextlib.closing(OIPBackend([HttpTransport(f"http://127.0.0.1:{port}")]))


def in_threads(work, count):
    """Run work(0), work(1), ... at once, and wait for all."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


def reference(layer, x):
    with torch.no_grad():
        return torch.nn.functional.linear(x, layer.weight, layer.bias)


def counts(layer):
    stats = layer.get_stats()
    assert stats["cloud_calls"] + stats["local_calls"] + stats["raised"] == stats["forwards"]
    return stats["cloud_calls"], stats["local_calls"], stats["raised"]
