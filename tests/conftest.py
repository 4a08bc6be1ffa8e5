"""What holds for every test: one thread, known seeds, no network, no file of the user's, no policy left behind."""

import logging
import os
import random
import socket
import sys

import pytest

# Before torch is loaded, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU kernels run in Triton's interpreter. Read when a kernel is defined, so set before any is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """Connections leave this machine in no test; a server of the test's own on the loopback is fine."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
            pytest.fail(f"a test connects to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_measurements_of_the_user(tmp_path_factory):
    """What was measured on this machine neither changes a test nor is changed by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_FP4_CACHE", str(tmp_path_factory.mktemp("measured")))
        yield


@pytest.fixture(autouse=True)
def _known_seeds():
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_policy_left():
    yield
    policy = sys.modules.get("apt_model.core.policy")
    if policy is not None and policy.current_policy() is not None:
        policy.set_policy(None)
        pytest.fail("the test leaves the process's policy set")


@pytest.fixture(scope="module")
def quiet_vgpu():
    """Nothing below an error from the VGPU stack's log in a module."""
    log = logging.getLogger("apt_model.vgpu")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)
