"""Graphs by shape and bucket, with a device whose recordings are closures: what is recorded, and what is proven."""

import time

import pytest
import torch
from torch import nn

from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import Recorded
from apt_model.optimization import graphs
from apt_model.optimization.graphs import Graphs, bucket_of

WIDTH, VOCABULARY = 8, 50


class Recorder:
    """Records as a GPU does: the work runs on the inputs' own memory, and each replay writes the same results anew."""

    kind = "cpu"

    def __init__(self):
        self.recorded = 0

    def record(self, work, pool=None):
        self.recorded += 1
        with torch.no_grad():
            result = work()

        def replay():
            for held, new in zip(result, work(), strict=True):
                if isinstance(held, torch.Tensor):
                    held.copy_(new)

        return Recorded(replay, result, pool or object())

    def synchronize(self):
        pass

    def current_stream(self):
        return None


class Model(nn.Module):
    """Tokens to vectors; `mixes` says over what a row's outputs reach."""

    def __init__(self, mixes="masked"):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out, self.mixes = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY), mixes
        self.eval().requires_grad_(False)
        self.calls = 0

    def forward(self, ids, attention_mask=None, *, scale=1.0):
        self.calls += 1
        x = self.table(ids)
        if self.mixes == "batch":
            x = x + x.mean(0)
        if self.mixes == "positions" or attention_mask is None:
            x = x + x.mean(1, keepdim=True)
        elif self.mixes == "masked":
            weights = attention_mask[..., None].to(x.dtype)
            x = x + (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return {"logits": self.out(x) * scale, "pooled": x[:, 0], "none": None}


@pytest.fixture(autouse=True)
def _always_worth(monkeypatch):
    """Times of closures say nothing: a replay is taken to be faster."""
    monkeypatch.setattr(graphs, "_WORTH", 1e9)
    monkeypatch.setattr(graphs, "_PADDED_WORTH", 1e9)


def tokens(rows, positions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, positions), generator=generator)


def made(model):
    return Graphs(model, model.forward, Recorder())


def check(graphs, model, ids, *args, **kwargs):
    found, expected = graphs(ids, *args, **kwargs), model(ids, *args, **kwargs)
    assert found.keys() == expected.keys()
    for name in ("logits", "pooled"):
        torch.testing.assert_close(found[name], expected[name])
    assert found["none"] is None
    return found


def test_buckets_are_at_most_half_as_much_again():
    assert [bucket_of(size) for size in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    for size in range(1, 5000):
        assert size <= bucket_of(size) <= max(1.5 * size, size)


def test_a_shape_is_recorded_when_it_comes_again_and_replayed_from_then_on():
    model = Model()
    found = made(model)
    for number in range(6):
        check(found, model, tokens(2, 16, number), torch.ones(2, 16, dtype=torch.int64))
        assert len(found) == (number > 0)
    assert (found.replays, found.plain_calls) == (4, 2)


def test_sizes_share_a_bucket_where_a_mask_hides_the_padding():
    model = Model()
    found = made(model)
    for rows, positions in [(4, 16), (4, 16), (3, 15), (3, 15), (4, 13), (4, 14), (4, 16)]:
        mask = torch.ones(rows, positions, dtype=torch.int64)
        mask[0, positions // 2 :] = 0
        out = check(found, model, tokens(rows, positions, rows * positions), mask)
        assert out["logits"].shape == (rows, positions, VOCABULARY)
        assert out["pooled"].shape == (rows, WIDTH)
    # (4, 16) and then (3, 16) for three rows; the padding of positions is proven by then.
    assert found.device.recorded == 2
    assert found.replays == 3


def test_a_model_that_sees_the_padding_is_recorded_at_exact_shapes():
    model = Model("positions")
    found = made(model)
    for positions in (13, 13, 14, 14, 13, 14):
        check(found, model, tokens(2, positions), torch.ones(2, positions, dtype=torch.int64))
    assert {key[1] for key in found._graphs} == {(2, 13), (2, 14)}
    assert "the outputs depend on what stands in the padding" in found.refused.values()


def test_rows_are_padded_where_only_positions_cannot_be():
    model = Model("positions")
    found = made(model)
    for rows in (5, 5, 5, 6, 5, 6, 6):
        check(found, model, tokens(rows, 16, rows), torch.ones(rows, 16, dtype=torch.int64))
    assert {key[1] for key in found._graphs} == {(6, 16)}


def test_a_model_whose_rows_see_each_other_is_not_padded_at_all():
    model = Model("batch")
    found = made(model)
    for _ in range(6):
        check(found, model, tokens(5, 13), torch.ones(5, 13, dtype=torch.int64))
    assert {key[1] for key in found._graphs} == {(5, 13)}


def test_plain_values_and_names_of_arguments_are_part_of_a_shape():
    model = Model()
    found = made(model)
    ids, mask = tokens(2, 4), torch.ones(2, 4, dtype=torch.int64)
    for scale in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0):
        check(found, model, ids, mask, scale=scale)
        check(found, model, ids, attention_mask=mask, scale=scale)
    assert len(found) == 4


def test_what_is_returned_is_not_overwritten_by_the_next_replay():
    model = Model()
    found = made(model)
    ids, mask = tokens(2, 4), torch.ones(2, 4, dtype=torch.int64)
    for _ in range(2):
        found(ids, mask)
    first = found(ids, mask)["logits"]
    copy = first.clone()
    found(tokens(2, 4, 9), mask)
    assert torch.equal(first, copy)


def test_training_and_gradients_are_run_as_they_are():
    model = Model()
    found = made(model)
    ids, mask = tokens(2, 4), torch.ones(2, 4, dtype=torch.int64)
    model.train()
    for _ in range(3):
        found(ids, mask)
    assert not len(found)
    model.eval().requires_grad_(True)
    for _ in range(3):
        assert found(ids, mask)["logits"].requires_grad
    assert not len(found)
    with torch.no_grad():
        for _ in range(2):
            found(ids, mask)
    assert len(found) == 1
    model.requires_grad_(False)
    model.out.weight.requires_grad_()  # neither the first parameter nor the last
    assert found(ids, mask)["logits"].requires_grad


def test_other_tensors_than_tokens_are_recorded_at_their_exact_shape():
    model = nn.Linear(4, 3).requires_grad_(False).eval()
    found = made(model)
    for rows in (2, 2, 3, 3, 2, 3):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(found(x), model(x))
    assert {key[1] for key in found._graphs} == {None}
    assert len(found) == 2


def test_what_cannot_be_recorded_says_why():
    class Odd(Model):
        def forward(self, ids, held):
            return self.table(ids), held

    model = Odd()
    found = made(model)
    for _ in range(3):
        found(tokens(2, 4), object())
    assert found.plain_calls == 3

    class Broken(Recorder):
        def record(self, *_):
            raise RuntimeError("operation not permitted when stream is capturing")

    found = Graphs(Model(), model.table, Broken())
    for _ in range(3):
        found(tokens(2, 4))
    assert list(found.refused.values()) == ["RuntimeError: operation not permitted when stream is capturing"]
    found = Graphs(Model(), lambda ids: [object(), ids], Recorder())
    for _ in range(3):
        found(tokens(2, 4))
    assert set(found.refused.values()) == {"an output is a object"}


def test_a_replay_that_is_not_faster_is_thrown_away(monkeypatch):
    monkeypatch.setattr(graphs, "_WORTH", 0.5)
    monkeypatch.setattr(graphs, "_PADDED_WORTH", 0.5)

    class Slow(Recorder):
        def record(self, work, pool=None):
            held = super().record(work, pool)
            return held._replace(replay=lambda: (time.sleep(0.02), held.replay()))

    model = Model()
    found = Graphs(model, model.forward, Slow())
    for _ in range(4):
        check(found, model, tokens(2, 4), torch.ones(2, 4, dtype=torch.int64))
    assert not len(found)
    assert any("of the forward's time" in why for why in found.refused.values())
    assert found.device.recorded == 1  # not again


def test_a_replay_with_other_numbers_is_not_used(caplog):
    class Wrong(Recorder):
        def record(self, work, pool=None):
            held = super().record(work, pool)
            return held._replace(replay=lambda: (held.replay(), held.result[0].mul_(1.5)))

    model = Model()
    found = Graphs(model, model.forward, Wrong())
    for _ in range(4):
        check(found, model, tokens(2, 4), torch.ones(2, 4, dtype=torch.int64))
    assert "a replay gives other numbers" in found.refused.values()
    assert "other numbers" in caplog.text


def test_weights_that_moved_are_noticed():
    model = Model()
    found = made(model)
    ids, mask = tokens(2, 4), torch.ones(2, 4, dtype=torch.int64)
    for _ in range(2):
        found(ids, mask)
    assert len(found) == 1
    for parameter in model.parameters():
        parameter.data = parameter.data * 2
    check(found, model, ids, mask)
    assert not len(found)


def test_no_more_graphs_are_kept_than_allowed(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    model = Model("batch")
    found = made(model)
    for positions in range(4, 10):
        for _ in range(3):
            check(found, model, tokens(2, positions), torch.ones(2, positions, dtype=torch.int64))
    assert len(found) == 3


def test_inference_mode_before_and_after():
    model = Model()
    found = made(model)
    ids, mask = tokens(2, 4), torch.ones(2, 4, dtype=torch.int64)
    with torch.inference_mode():
        for _ in range(3):
            check(found, model, ids, mask)
    check(found, model, ids, mask)
    assert found.replays == 2


def test_autocast_is_part_of_a_shape():
    model = Model()
    found = made(model)
    ids, mask = tokens(2, 4), torch.ones(2, 4, dtype=torch.int64)
    for _ in range(3):
        assert found(ids, mask)["logits"].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert found(ids, mask)["logits"].dtype == torch.bfloat16
    assert len(found) == 2


def test_a_cpu_has_no_recordings():
    assert not hasattr(CpuDevice(), "record")
