import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.core.errors import InputError
from apt_model.ops.low_rank import compress, random_basis, refresh_basis
from apt_model.ops.low_rank.naive import project, row_scale

# fp32 products of matrices of a few dozen rows: a few ulp (1.2e-7) times the square root of the length.
RELATIVE = 2e-6
CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(columns, rank, index=0):
    return random_basis(columns, rank, seed=1, index=index, step=0, device=CPU)


def decaying(rows=24, columns=16):
    return noise(rows, columns) @ torch.diag(torch.logspace(0, -2, columns))


def ratio(a, b):
    return float(torch.linalg.vector_norm(a) / torch.linalg.vector_norm(b))


def oblique_counterexample(floor):
    """One long row and 200 short ones that the balance makes as long: the worst basis mixes the two directions."""
    gradient = torch.zeros(201, 2)
    gradient[0, 0] = 1.0
    gradient[1:, 1] = floor
    start = torch.tensor([[1.0], [200**-0.5]])
    return gradient, start / torch.linalg.vector_norm(start)


@pytest.mark.parametrize("row_balance", [False, True])
def test_a_gradient_of_that_rank_is_recovered(row_balance):
    gradient = noise(24, 4, seed=1) @ noise(4, 16, seed=2)
    made = compress(gradient, None, basis(16, 4), row_balance=row_balance)
    assert ratio(made.error, gradient) < RELATIVE * 10  # row balance multiplies and divides by scales apart up to 10
    assert torch.equal(made.error, gradient - made.sent)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 9, 6), (9, 6, 6), (5, 5, 8)])
def test_full_rank_sends_the_gradient_bit_for_bit(rows, columns, rank):
    gradient, error = noise(rows, columns), noise(rows, columns, seed=1)
    start = basis(columns, min(rank, columns))
    start = torch.cat([start, start], dim=1)[:, :rank]
    made = compress(gradient, error, start, row_balance=True)
    assert torch.equal(made.sent, gradient + error)
    assert not made.error.any()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(2, 40), rank=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_the_unbalanced_step_is_an_orthogonal_projection(rows, columns, rank, seed):
    spread = torch.logspace(-2, 2, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]
    target = noise(rows, columns, seed=seed) * spread[:, None]
    made = compress(target, None, basis(columns, min(rank, columns), index=seed), row_balance=False)
    energy = float(target.square().sum())
    assert ratio(made.error, target) <= 1 + RELATIVE
    assert ratio(made.sent, target) <= 1 + RELATIVE
    assert abs(float((made.sent * made.error).sum())) <= 10 * RELATIVE * energy


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(2, 40), rank=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_the_guarded_balanced_step_never_expands(rows, columns, rank, seed):
    spread = torch.logspace(-2, 2, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]
    target = noise(rows, columns, seed=seed) * spread[:, None]
    made = compress(target, None, basis(columns, min(rank, columns), index=seed), row_balance=True)
    assert ratio(made.error, target) <= 1 + RELATIVE


@pytest.mark.parametrize(("kappa", "floor", "worst"), [(0.1, 0.1, 4.0), (0.0, 1e-4, 7.0)])
def test_the_oblique_counterexample_is_guarded(kappa, floor, worst):
    gradient, start = oblique_counterexample(floor)
    unguarded, _ = project(gradient, start, row_scale(gradient, kappa))
    assert ratio(gradient - unguarded, gradient) > worst  # negative control: without the guard it expands
    guarded = compress(gradient, None, start, row_balance=True, kappa=kappa)
    plain = compress(gradient, None, start, row_balance=False)
    assert ratio(guarded.error, gradient) <= 1
    assert torch.equal(guarded.sent, plain.sent)
    assert torch.equal(guarded.basis, plain.basis)


def test_row_balance_serves_the_small_rows_where_it_does_not_expand():
    gradient = noise(24, 16) * torch.logspace(0, 2, 24)[:, None]
    worst = {}
    for row_balance in (False, True):
        made = compress(gradient, None, basis(16, 4), row_balance=row_balance, kappa=1e-3)
        rows = torch.linalg.vector_norm(made.error, dim=1) / torch.linalg.vector_norm(gradient, dim=1)
        worst[row_balance] = float(rows.max())
    assert worst[True] < worst[False]


def test_kappa_bounds_the_scale_from_below():
    target = torch.diag(torch.tensor([100.0, 1.0, 0.0]))
    assert row_scale(target, 0.1).flatten().tolist() == [100, 10, 10]
    assert row_scale(target, 0.0).flatten().tolist() == [100, 1, 1]


def run(steps, *, feedback, refresh=None):
    gradient, error, start = decaying(), None, basis(16, 4)
    total = torch.zeros_like(gradient)
    for step in range(steps):
        if refresh and step % refresh == 0:
            start = refresh_basis(gradient if error is None else gradient + error, 4, seed=0, index=0, step=step)
        made = compress(gradient, error, start, row_balance=False)
        total += made.sent
        start, error = made.basis, made.error if feedback else None
    return ratio(total / steps - gradient, gradient)


@pytest.mark.parametrize("refresh", [None, 50])
def test_error_feedback_sends_a_constant_gradient_in_full(refresh):
    assert run(400, feedback=True, refresh=refresh) < 0.01
    assert run(400, feedback=True, refresh=refresh) < run(100, feedback=True, refresh=refresh) / 2


def test_without_error_feedback_the_tail_never_comes():
    # Negative control: what stays out is all past the fourth singular value, however long one waits.
    values = torch.linalg.svdvals(decaying())
    tail = ratio(values[4:], values)
    assert tail > 0.1
    assert run(400, feedback=False) == pytest.approx(tail, rel=0.02)


@pytest.mark.parametrize("row_balance", [False, True])
def test_a_zero_gradient_sends_zero_and_keeps_the_basis(row_balance):
    start = basis(16, 4)
    made = compress(torch.zeros(24, 16), torch.zeros(24, 16), start, row_balance=row_balance)
    assert not made.sent.any()
    assert not made.error.any()
    assert torch.equal(made.basis, start)


@pytest.mark.parametrize("row_balance", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_scaling_the_gradient_scales_what_is_sent(row_balance, scale):
    gradient, error, start = decaying(), noise(24, 16, seed=3), basis(16, 4)
    one = compress(gradient, error, start, row_balance=row_balance)
    many = compress(gradient * scale, error * scale, start, row_balance=row_balance)
    assert ratio(many.sent / scale - one.sent, one.sent) < 10 * RELATIVE
    assert ratio(many.basis @ many.basis.T - one.basis @ one.basis.T, one.basis) < 1e-4  # the same subspace


def test_the_next_basis_is_orthonormal_and_learns_the_subspace():
    gradient, start = decaying(), basis(16, 4)
    first = compress(gradient, None, start, row_balance=False)
    for _ in range(10):
        start = compress(gradient, None, start, row_balance=False).basis
    assert torch.allclose(start.T @ start, torch.eye(4), atol=1e-5)
    settled = compress(gradient, None, start, row_balance=False)
    values = torch.linalg.svdvals(gradient)
    assert ratio(settled.error, gradient) < ratio(first.error, gradient)
    assert ratio(settled.error, gradient) == pytest.approx(ratio(values[4:], values), rel=0.01)


def test_a_refresh_sees_what_a_warm_start_is_blind_to():
    gradient = torch.zeros(8, 8)
    gradient[0, 0], gradient[1, 1] = 1.0, 5.0
    blind = torch.zeros(8, 1)
    blind[0] = 1.0
    for _ in range(20):
        blind = compress(gradient, None, blind, row_balance=False).basis
    assert ratio(compress(gradient, None, blind, row_balance=False).error, gradient) > 0.9
    fresh = refresh_basis(gradient, 1, seed=0, index=0, step=200)
    assert ratio(compress(gradient, None, fresh, row_balance=False).error, gradient) < 0.25


def test_a_refresh_leans_towards_the_target():
    target, noisy = decaying(), basis(16, 4)
    fresh = refresh_basis(target, 4, seed=1, index=0, step=0)  # from the noise that `basis` is made of
    assert ratio(target @ fresh, target) > 0.95
    assert ratio(target @ noisy, target) < 0.8


def test_refreshing_on_a_zero_target_gives_a_usable_basis():
    fresh = refresh_basis(torch.zeros(8, 6), 2, seed=0, index=0, step=0)
    assert torch.allclose(fresh.T @ fresh, torch.eye(2), atol=1e-6)


def test_noise_follows_from_seed_index_and_step_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = {
        key: random_basis(16, 4, seed=key[0], index=key[1], step=key[2], device=CPU)
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1), (1, 10, 0), (11, 0, 0)]
    }
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(draws[0, 0, 0], random_basis(16, 4, seed=0, index=0, step=0, device=CPU))
    values = list(draws.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_a_step_is_a_function():
    gradient, error, start = decaying(), noise(24, 16, seed=3), basis(16, 4)
    kept = [value.clone() for value in (gradient, error, start)]
    one = compress(gradient, error, start, row_balance=True)
    two = compress(gradient, error, start, row_balance=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, (gradient, error, start), strict=True))


def test_a_bf16_gradient_is_compressed_in_fp32():
    gradient = decaying().bfloat16()
    made = compress(gradient, None, basis(16, 4), row_balance=False)
    assert {value.dtype for value in made} == {torch.float32}
    assert torch.equal(made.sent, compress(gradient.float(), None, basis(16, 4), row_balance=False).sent)


@pytest.mark.parametrize(
    ("gradient", "error", "start"),
    [((3, 4, 5), None, (5, 2)), ((6, 4), (4, 6), (4, 2)), ((6, 4), None, (6, 2)), ((6, 4), None, (4,))],
)
def test_shapes_that_do_not_fit_are_refused(gradient, error, start):
    with pytest.raises(InputError, match="expected"):
        compress(
            torch.zeros(gradient), None if error is None else torch.zeros(error), torch.zeros(start), row_balance=False
        )
