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


def off(by):
    """A server whose answers are off by a factor in one row of four, gradients too."""
    fake, right = FakeServer(), FakeServer().kinds["mlp"]

    def wrong(config, tensors, x):
        y = right(config, tensors, x)
        return torch.cat([y[:1] * by, y[1:]])

    fake.kinds["mlp"] = wrong
    return fake


def caught(remote, forwards=300):
    """How many forwards were computed here as their answer was seen to be wrong."""
    with torch.no_grad():
        for _ in range(forwards):
            remote(torch.randn(4, 8))
    stats = remote.get_stats()
    assert stats["errors"] == ({"IntegrityError": stats["local_calls"]} if stats["local_calls"] else {})
    return stats["local_calls"], stats["spot_checks"]


def test_a_spot_check_finds_a_server_that_is_often_wrong():
    local = Local()
    with in_process(off(1.01)) as backend:
        # A row of four is off, and a row of four is looked at: one in four, give or take seven standard deviations.
        found, checks = caught(block(local, backend, local=local, spot_check=1.0))
        assert checks == 300
        assert 75 - 53 < found < 75 + 53
        found, checks = caught(block(local, backend, local=local, spot_check=0.5))
        assert 150 - 61 < checks < 150 + 61
        assert 0 < found < checks
        assert caught(block(local, backend, local=local)) == (0, 0)
    with in_process(off(1.0001)) as backend:  # less than what devices may differ by
        assert caught(block(local, backend, local=local, spot_check=1.0)) == (0, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wire", ["exact", "int8g64"])
def test_a_spot_check_lets_right_answers_pass(dtype, wire):
    local = Local(64, 96).to(dtype)
    with in_process(FakeServer()) as backend:
        remote = block(local, backend, local=local, wire=wire, spot_check=1.0)
        for _ in range(50):
            x = torch.randn(4, 64, dtype=dtype, requires_grad=True)
            remote(x).sum().backward()
        stats = remote.get_stats()
        assert (counts(remote), stats["backward_cloud"], stats["spot_checks"]) == ((50, 0, 0), 50, 100)


def test_a_spot_check_looks_at_one_row_and_at_gradients():
    local, rows = Local(), []
    local.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with in_process(FakeServer()) as backend:
        remote = block(local, backend, local=local, spot_check=1.0)
        remote(torch.randn(40, 8))
        assert rows == [1]
    other = Local()  # whose gradients are others
    fake = FakeServer()
    fake.kinds["mlp"] = lambda _, _tensors, x: (other if x.requires_grad else local)(x)
    with in_process(fake) as backend:
        remote = block(local, backend, local=local, spot_check=1.0)
        x = torch.randn(4, 8, requires_grad=True)
        remote(x).sum().backward()
        found, x.grad = x.grad, None
        local(x).sum().backward()
        torch.testing.assert_close(found, x.grad)
        stats = remote.get_stats()
        assert (counts(remote), stats["backward_local"], stats["errors"]) == ((1, 0, 0), 1, {"IntegrityError": 1})


def test_a_spot_check_needs_a_local_block_and_a_share():
    with in_process() as backend:
        with pytest.raises(ConfigError, match="no local block"):
            block(Local(), backend, spot_check=0.1)
        for rate in (-0.1, 1.1, float("nan")):
            with pytest.raises(ConfigError, match="a share from 0 to 1"):
                block(Local(), backend, local=Local(), spot_check=rate)


def test_weights_that_changed_in_place_are_pushed_again():
    local = Local()
    with in_process(FakeServer()) as backend, torch.no_grad():
        remote, x = block(local, backend), torch.randn(3, 8)
        torch.testing.assert_close(remote(x), local(x))
        local.up.weight.mul_(2)
        torch.testing.assert_close(remote(x), local(x))
        assert counts(remote) == (2, 0, 0)
