"""What holds for every test of clouds: no setting of the user's, nothing left open."""

import gc
import threading

import pytest

from apt_model.cloud.manager import get_cloud_npu_manager
from apt_model.core import env


@pytest.fixture(autouse=True)
def _no_clouds_of_the_user(monkeypatch):
    for variable in (*env.CLOUDS, env.CLOUD_ENDPOINT, env.CLOUD_API_KEY):
        monkeypatch.delenv(variable.name, raising=False)


@pytest.fixture(autouse=True)
def _nothing_left_open():
    before = set(threading.enumerate())
    yield
    get_cloud_npu_manager().close()
    gc.collect()  # a socket left open warns, and warnings are errors
    ours = ("apt-cloud", "fake-http")
    left = [each for each in threading.enumerate() if each not in before and each.name.startswith(ours)]
    for each in left:
        each.join(2)
    assert not [each for each in left if each.is_alive()]
