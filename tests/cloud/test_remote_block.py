"""`RemoteBlock`: any kind that a server knows, forward and backward; what trains before it gets its gradient."""

import logging

import pytest
import torch
from clouds import counts, in_process
from torch import nn

from apt_model.cloud.fake import FakeServer
from apt_model.cloud.remote_block import RemoteBlock
from apt_model.core.errors import CloudError, ConfigError, IntegrityError


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "apt_model.cloud")


class Local(nn.Module):
    def __init__(self, width=8, hidden=20):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def block(whose, backend, **options):
    return RemoteBlock("mlp", {"activation": "gelu"}, whose.state_dict(), cloud_backend=backend, **options)


@pytest.mark.parametrize("fault", [None, "fail"])
def test_what_trains_before_it_gets_the_same_gradient(fault):
    local = Local()
    with in_process(FakeServer(fault=lambda _: fault)) as backend:
        remote = block(local, backend, local=local)
        grads = []
        for module in (remote, local):
            torch.manual_seed(1)
            before, behind = nn.Linear(8, 8), nn.Linear(8, 2)  # as an adapter and a head
            x = torch.randn(3, 5, 8)
            behind(module(before(x))).square().sum().backward()
            grads.append([each.grad for each in (*before.parameters(), *behind.parameters())])
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two)
        assert counts(remote) == ((1, 0, 0) if fault is None else (0, 1, 0))
        stats = remote.get_stats()
        assert (stats["backward_cloud"], stats["backward_local"]) == ((1, 0) if fault is None else (0, 0))
        assert not list(remote.parameters())
        assert not remote.state_dict()


def test_several_in_a_row_and_rows_that_are_cut():
    one, two = Local(), Local()
    fake = FakeServer(max_body=6000, max_upload=1 << 20)
    with in_process(fake) as backend, torch.no_grad():
        row = nn.Sequential(block(one, backend), block(two, backend))
        x = torch.randn(90, 8)
        torch.testing.assert_close(row(x), two(one(x)))
        assert all(counts(each) == (1, 0, 0) for each in row)
        assert len(fake.ids) > 2
        assert "mlp" in repr(row)


def test_without_a_local_block_the_error_is_raised():
    fake = FakeServer(fault=lambda _: "fail")
    with in_process(fake) as backend:
        remote = block(Local(), backend)
        with pytest.raises(CloudError):
            remote(torch.randn(2, 8))
        assert counts(remote) == (0, 0, 1)
        with pytest.raises(ConfigError, match="no local block"):
            remote(torch.randn(2, 8).double())
    with pytest.raises(ConfigError, match="no cloud backend"):
        block(Local(), None)


def test_a_backward_that_fails_is_computed_here_where_there_is_a_local_block():
    local = Local()
    fake = FakeServer(fault=lambda path: "fail" if ".bwd" in path else None)
    with in_process(fake) as backend:
        remote = block(local, backend, local=local)
        x = torch.randn(2, 8, requires_grad=True)
        remote(x).sum().backward()
        found, x.grad = x.grad, None
        local(x).sum().backward()
        torch.testing.assert_close(found, x.grad)
        assert remote.get_stats()["backward_local"] == 1


def test_numbers_that_are_none_are_not_used():
    fake = FakeServer()
    fake.kinds["mlp"] = lambda _, _tensors, x: x * float("nan")
    local = Local()
    with in_process(fake) as backend, torch.no_grad():
        with pytest.raises(IntegrityError):
            block(local, backend)(torch.randn(2, 8))
        x = torch.randn(2, 8)
        assert torch.equal(block(local, backend, local=local)(x), local(x))


def test_a_local_block_that_trains_is_refused():
    with in_process() as backend, pytest.raises(ConfigError, match="parameters are frozen"):
        block(Local(), backend, local=Local().requires_grad_())


def test_eight_bits_and_a_width_that_changes():
    weight = torch.randn(128, 64)
    with in_process() as backend, torch.no_grad():
        remote = RemoteBlock("linear", {}, {"weight": weight}, cloud_backend=backend, out_features=128, wire="int8g64")
        x = torch.randn(4, 3, 64)
        found = remote(x)
        assert float((found - x @ weight.T).norm() / found.norm()) < 0.02
        assert remote.push_weights() == 0
