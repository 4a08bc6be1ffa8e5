import math

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apt_model.core.errors import CheckpointError, InputError
from apt_model.ops.low_rank import compress, random_basis, refresh_basis
from apt_model.trainer.config import GradientConfig
from apt_model.trainer.gradients import GradientTreatment, untreated

METHODS = ["global", "adagc", "zclip"]


class Model(nn.Module):
    """An embedding, two hidden matrices of different shapes, a norm and a head, as a transformer has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.norm = nn.RMSNorm(20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 11, bias=False)

    def hidden_matrices(self):
        return [("up.weight", self.up.weight), ("down.weight", self.down.weight)]


def treat(model, *, seed=0, **options):
    return GradientTreatment(model, GradientConfig(**options), seed=seed, hidden=model.hidden_matrices())


def fill(model, step, scale=1.0):
    """Gradients of full rank that follow from the step alone."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.grad = scale * noise


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def equal(left, right):
    """Bit-equal, NaN included."""
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


def values(state):
    return [value.reshape(-1) for value in state.values()]


def norm(tensors):
    return float(torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors])))


@pytest.mark.parametrize("clipping", METHODS)
def test_the_report_is_of_the_gradients_as_they_came(clipping):
    model = Model()
    fill(model, 0, scale=5.0)
    expected = norm(gradients(model))
    report = treat(model, clipping=clipping, rank_ratio=0.25)(0)
    assert report.norm.item() == pytest.approx(expected, rel=1e-6)
    assert report.found_inf.item() == 0
    assert [(value.dtype, value.shape) for value in report] == [(torch.float32, torch.Size())] * 2


def test_untreated_reports_and_touches_nothing():
    model = Model()
    fill(model, 0, scale=100.0)
    before = gradients(model)
    report = untreated(model)
    assert report.norm.item() == pytest.approx(norm(before), rel=1e-6)
    assert report.found_inf.item() == 0
    assert equal(before, gradients(model))
    model.up.bias.grad[0] = torch.nan
    assert math.isnan(untreated(model).norm.item())
    assert untreated(model).found_inf.item() == 0


def test_parameters_without_a_gradient_are_left_out():
    model = Model()
    fill(model, 0)
    model.embed.weight.grad = model.up.weight.grad = None
    model.norm.weight.requires_grad_(False)
    for clipping in METHODS:
        report = treat(model, clipping=clipping, rank_ratio=0.25)(0)
        assert report.found_inf.item() == 0
        assert model.embed.weight.grad is None
    model.zero_grad()
    assert treat(model)(0).norm.item() == 0


def test_bf16_gradients_have_an_fp32_norm():
    model = Model().bfloat16()
    fill(model, 0)
    expected = norm([gradient.double() for gradient in gradients(model)])
    report = treat(model, rank_ratio=0.25)(0)
    assert report.norm.dtype == torch.float32
    assert report.norm.item() == pytest.approx(expected, rel=1e-6)
    assert model.up.weight.grad.dtype == torch.bfloat16


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value would be brought to the host, or decide a shape."""

    forbidden = ("_local_scalar_dense", "is_nonzero", "equal.default", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.forbidden), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clipping", METHODS)
def test_no_value_is_read_on_the_host(clipping):
    model = Model()
    treatment = treat(model, clipping=clipping, rank_ratio=0.25, row_balance=True, refresh_steps=2)
    for step in range(4):
        fill(model, step)
        with NoReading():
            treatment(step)
            untreated(model)
    with NoReading(), pytest.raises(AssertionError, match="waits"):  # negative control
        bool(torch.ones(()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="whether the host waits shows on an asynchronous device only")
@pytest.mark.parametrize("clipping", METHODS)
def test_the_host_never_waits_for_cuda(clipping):
    model = Model().cuda()
    treatment = treat(model, clipping=clipping, rank_ratio=0.25, row_balance=True, refresh_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(5):
        fill(model, step, scale=torch.nan if step == 3 else 1.0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)  # cycles, some 0.3 s: the device is busy while the host goes on
        optimizer.found_inf = treatment(step).found_inf
        untreated(model)
        optimizer.step()
        # Libraries start up and memory is first taken on steps 0 (with a restart of the projection) and 1 (without).
        assert step < 2 or not torch.cuda.current_stream().query(), "the host waited for the device"
        assert optimizer.found_inf.item() == (step == 3)
        assert torch.cuda.current_stream().query()  # negative control: reading a value waits
        assert equal(before, list(model.parameters())) is (step == 3)
    assert all(value.isfinite().all() for value in treatment.state_dict().values())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1.0])
def test_global_clipping_is_bit_equal_to_torch(scale, absent, max_norm):
    ours, theirs = Model(), Model()
    for model in (ours, theirs):
        fill(model, 3, scale)
        if absent:
            model.up.weight.grad = None
    report = treat(ours, max_norm=max_norm)(0)
    assert torch.equal(report.norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("clipping", METHODS)
def test_clipping_chooses_the_method(clipping):
    # 130 steady steps take every method past its warm-up; then one tensor spikes a hundredfold.
    model = Model()
    treatment = treat(model, clipping=clipping, max_norm=1e3)
    for step in range(130):
        fill(model, step, scale=0.1)
        treatment(step)
    fill(model, 130, scale=0.1)
    model.up.weight.grad *= 100
    spiked, quiet = model.up.weight.grad.clone(), model.down.weight.grad.clone()
    treatment(130)
    kept = norm([model.up.weight.grad]) / norm([spiked]), norm([model.down.weight.grad]) / norm([quiet])
    low, high = {"global": ((1, 1), (1, 1)), "adagc": ((0, 0.02), (0.9, 1)), "zclip": ((0, 0.03), (0, 0.03))}[clipping]
    assert low[0] <= kept[0] <= low[1] + 1e-6
    assert high[0] <= kept[1] <= high[1] + 1e-6


@pytest.mark.parametrize("clipping", METHODS)
@pytest.mark.parametrize("max_norm", [0.25, 2.0])
def test_max_norm_bounds_the_first_steps_of_every_method(clipping, max_norm):
    model = Model()
    treatment = treat(model, clipping=clipping, max_norm=max_norm)
    for step in range(3):
        fill(model, step, scale=10.0)
        treatment(step)
        assert norm(gradients(model)) == pytest.approx(max_norm, rel=1e-4)


def ranks(model):
    return [int(torch.linalg.matrix_rank(weight.grad, rtol=1e-4)) for _, weight in model.hidden_matrices()]


@pytest.mark.parametrize(("rank_ratio", "rank"), [(0.01, 1), (0.25, 3), (0.5, 6), (1.0, 12), (0.0, 12)])
def test_rank_ratio_sets_the_rank_of_hidden_matrices_alone(rank_ratio, rank):
    model, plain = Model(), Model()
    fill(model, 0)
    fill(plain, 0)
    treat(model, rank_ratio=rank_ratio)(0)
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    assert ranks(model) == [rank, rank]
    hidden = {name for name, _ in model.hidden_matrices()}
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) is (name not in hidden or rank == 12), name


def test_only_compressed_matrices_are_remembered():
    model = Model()
    keys = {f"low_rank.{kind}.{name}" for kind in ("basis", "error") for name, _ in model.hidden_matrices()}
    assert treat(model, rank_ratio=0.25).state_dict().keys() == keys
    assert treat(model, rank_ratio=1.0).state_dict() == treat(model, rank_ratio=0.0).state_dict() == {}
    model.up.weight.requires_grad_(False)
    assert len(treat(model, rank_ratio=0.25).state_dict()) == 2


@pytest.mark.parametrize("refresh_steps", [2, 1000])
def test_compression_is_the_operator_with_error_basis_and_seeds_by_place(refresh_steps):
    model = Model()
    treatment = treat(model, seed=5, max_norm=1e6, rank_ratio=0.25, row_balance=True, refresh_steps=refresh_steps)
    device, size = torch.device("cpu"), {"up.weight": (20, 12), "down.weight": (12, 20)}
    errors = {name: torch.zeros(shape) for name, shape in size.items()}
    bases = {
        name: random_basis(shape[1], 3, seed=5, index=index, step=-1, device=device)
        for index, (name, shape) in enumerate(size.items())
    }
    for step in range(1, 6):
        fill(model, step)
        before = {name: weight.grad.clone() for name, weight in model.hidden_matrices()}
        treatment(step)
        for index, (name, weight) in enumerate(model.hidden_matrices()):
            if step % refresh_steps == 0:
                bases[name] = refresh_basis(before[name] + errors[name], 3, seed=5, index=index, step=step)
            sent, errors[name], bases[name] = compress(before[name], errors[name], bases[name], row_balance=True)
            assert torch.equal(weight.grad, sent)


def total_sent(steps, **options):
    model = Model()
    treatment = treat(model, max_norm=1e6, rank_ratio=0.25, **options)
    total = torch.zeros_like(model.up.weight)
    for step in range(steps):
        fill(model, 0)
        gradient = model.up.weight.grad.clone()
        treatment(step)
        total += model.up.weight.grad
    return norm([total / steps - gradient]) / norm([gradient])


def test_error_feedback_recovers_a_constant_gradient():
    assert total_sent(300) < 0.03
    assert total_sent(300, error_feedback=False) > 0.3  # negative control: full-rank noise has a heavy tail


def test_without_error_feedback_no_error_is_kept():
    assert not any("error" in key for key in treat(Model(), rank_ratio=0.25, error_feedback=False).state_dict())


def test_row_balance_changes_what_is_sent_and_never_expands():
    sent = {}
    for row_balance in (False, True):
        model = Model()
        treatment = treat(model, max_norm=1e6, rank_ratio=0.25, row_balance=row_balance, error_feedback=False)
        fill(model, 0)
        model.up.weight.grad *= torch.logspace(0, 1, 20)[:, None]
        before = model.up.weight.grad.clone()
        treatment(0)
        sent[row_balance] = model.up.weight.grad
        assert norm([before - sent[row_balance]]) <= norm([before])
    assert not torch.allclose(sent[False], sent[True], rtol=1e-2)


def test_refresh_steps_restarts_the_projection():
    model = Model()
    often, seldom = (treat(model, rank_ratio=0.25, refresh_steps=steps) for steps in (3, 1000))
    same = []
    for step in range(7):
        states = []
        for treatment in (often, seldom):
            if step == 0:
                continue  # both restart at 0: start at 1, so that only the interval tells
            fill(model, 99)
            treatment(step)
            states.append(treatment.state_dict()["low_rank.basis.up.weight"])
        if states:
            same.append(torch.equal(*states))
    assert same == [True, True, False, False, False, False]  # the first difference is at step 3


def test_the_gradient_is_clipped_before_the_error_is_added():
    model = Model()
    treatment = treat(model, max_norm=1.0, rank_ratio=0.25)
    fill(model, 0)
    treatment(0)
    error = treatment.state_dict()["low_rank.error.up.weight"]
    fill(model, 1, scale=1e4)
    raw = model.up.weight.grad.clone()
    report = treatment(1)
    clipped = raw / report.norm
    left = treatment.state_dict()["low_rank.error.up.weight"]
    assert torch.allclose(model.up.weight.grad + left, clipped + error, atol=1e-6)
    assert norm([left]) <= norm([clipped]) + norm([error])  # an outlier of 10,000 leaves no outlier in the error


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    def run(seed):
        model = Model()
        torch.manual_seed(seed + 1000)
        before = torch.get_rng_state()
        treatment = treat(model, seed=seed, rank_ratio=0.1, refresh_steps=2)
        for step in range(5):
            fill(model, step)
            treatment(step)
        assert torch.equal(torch.get_rng_state(), before)
        return gradients(model) + values(treatment.state_dict())

    assert equal(run(0), run(0))
    assert not equal(run(0), run(1))


@pytest.mark.parametrize("clipping", METHODS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("warm", [2, 130])
def test_a_gradient_that_is_not_finite_changes_no_state(clipping, poison, warm):
    # 3e38 is finite and its square is not: the norm decides.
    model = Model()
    treatment = treat(model, clipping=clipping, rank_ratio=0.25, refresh_steps=1, row_balance=True)
    for step in range(warm):
        fill(model, step)
        treatment(step)
    before = treatment.state_dict()
    fill(model, warm)
    model.up.weight.grad[3, 5] = poison
    assert treatment(warm).found_inf.item() == 1
    assert equal(values(before), values(treatment.state_dict()))


@pytest.mark.parametrize("clipping", METHODS)
def test_a_skipped_first_step_leaves_no_trace(clipping):
    results = []
    for spoiled in (False, True):
        model = Model()
        treatment = treat(model, clipping=clipping, rank_ratio=0.25, refresh_steps=4)
        if spoiled:
            fill(model, 0, scale=torch.nan)
            treatment(4)
        for step in range(1, 4):
            fill(model, step)
            treatment(step)
        results.append(gradients(model) + values(treatment.state_dict()))
    assert equal(*results)


@pytest.mark.parametrize("after", [0, 3])
def test_found_inf_makes_fused_adamw_skip_the_step_exactly(after):
    model = Model()
    treatment = treat(model, rank_ratio=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)

    def step(number, scale=1.0):
        fill(model, number, scale)
        optimizer.found_inf = treatment(number).found_inf  # where torch's own GradScaler puts it
        optimizer.step()

    def everything():
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        return [parameter.detach().clone() for parameter in model.parameters()], moments

    for number in range(after):
        step(number)
    parameters, moments = everything()
    step(after, scale=torch.nan)
    kept, still = everything()
    assert equal(parameters, kept)
    assert equal(moments, still) if after else not any(value.any() for value in still)
    assert all(state["step"].item() == after for state in optimizer.state.values())
    step(after + 1)  # and the next one is taken
    assert not equal(parameters, everything()[0])
    assert all(state["step"].item() == after + 1 for state in optimizer.state.values())


def test_without_found_inf_the_optimizer_would_be_ruined():
    model = Model()
    fill(model, 0, scale=torch.nan)
    treat(model)(0)
    torch.optim.AdamW(model.parameters(), fused=True).step()
    assert model.up.weight.isnan().all()


@pytest.mark.parametrize("clipping", METHODS)
@pytest.mark.parametrize("at", [10, 110])
def test_a_run_goes_on_bit_for_bit_from_its_state(clipping, at, tmp_path):
    options = {"clipping": clipping, "rank_ratio": 0.25, "row_balance": True, "refresh_steps": 4}
    model = Model()
    whole = treat(model, **options)
    for step in range(at):
        fill(model, step)
        whole(step)
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "state.safetensors")
    resumed = treat(model, **options)
    resumed.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    for step in range(at, at + 10):
        outcome = []
        for treatment in (whole, resumed):
            fill(model, step)
            treatment(step)
            outcome.append(gradients(model) + values(treatment.state_dict()))
        assert equal(*outcome)


def test_the_state_is_a_copy():
    model = Model()
    treatment = treat(model, clipping="adagc", rank_ratio=0.25)
    before = treatment.state_dict()
    kept = {key: value.clone() for key, value in before.items()}
    fill(model, 0)
    treatment(0)
    assert equal(values(before), values(kept))
    assert not equal(values(before), values(treatment.state_dict()))


def test_state_that_does_not_fit_is_refused_by_name_and_nothing_is_loaded():
    model = Model()
    treatment = treat(model, clipping="adagc", rank_ratio=0.25)
    good = treatment.state_dict()
    assert "adagc.norm.up.weight" in good
    faults = {
        "missing low_rank.error.up.weight": {k: v for k, v in good.items() if k != "low_rank.error.up.weight"},
        "unexpected zclip.mean": good | {"zclip.mean": torch.zeros(())},
        r"low_rank.basis.up.weight has shape \[12, 5\], expected \[12, 3\]": (
            {key: value + 1 for key, value in good.items()} | {"low_rank.basis.up.weight": torch.zeros(12, 5)}
        ),
    }
    for message, state in faults.items():
        with pytest.raises(CheckpointError, match=message):
            treatment.load_state_dict(state)
        assert equal(values(good), values(treatment.state_dict()))


def test_each_parameters_entry_carries_its_own_number():
    model = Model()
    treatment = treat(model, clipping="adagc", max_norm=1e6)
    fill(model, 0)
    treatment(0)
    state = treatment.state_dict()
    for name, parameter in model.named_parameters():
        assert state[f"adagc.norm.{name}"].item() == pytest.approx(norm([parameter.grad]), rel=1e-6)


def test_state_of_another_clipping_is_refused():
    model = Model()
    with pytest.raises(CheckpointError, match=r"missing zclip.count.*unexpected adagc.count"):
        treat(model, clipping="zclip").load_state_dict(treat(model, clipping="adagc").state_dict())


def test_hidden_takes_distinct_matrices_of_the_model():
    model, config = Model(), GradientConfig(rank_ratio=0.25)
    stranger = nn.Parameter(torch.zeros(4, 4))
    for hidden, message in [
        ([("norm.weight", model.norm.weight)], r"norm.weight.*matrix"),
        ([("x", stranger)], r"'x'.*of the model"),
        ([("a", model.up.weight), ("b", model.up.weight)], r"'b'.*once"),
    ]:
        with pytest.raises(InputError, match=message):
            GradientTreatment(model, config, seed=0, hidden=hidden)


def test_a_model_that_trains_nothing_is_refused():
    model = Model().requires_grad_(False)
    with pytest.raises(InputError, match="Model has none"):
        treat(model)
    with pytest.raises(InputError, match="Model has none"):
        untreated(model)
