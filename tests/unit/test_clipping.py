import math

import pytest
import torch

from apt_model.trainer.clipping import AdaGC, GlobalClip, ZClip


def drive(clipper, series):
    """Feed norms [T][P]; give the factors [T][P] and the last state."""
    state, factors = clipper.initial(len(series[0]), torch.device("cpu")), []
    for norms in series:
        norms_P = torch.tensor(norms)
        factor, state = clipper(state, norms_P, torch.linalg.vector_norm(norms_P))
        factors.append(factor.expand(len(norms)).tolist())
    return factors, state


def noisy(length, *, at=(), size=50.0, centre=(0.3, 0.05, 0.6)):
    generator = torch.Generator().manual_seed(7)
    series = (torch.tensor(centre) * (1 + 0.1 * torch.randn(length, len(centre), generator=generator))).tolist()
    for step in at:
        series[step] = [series[step][0] * size, *series[step][1:]]
    return series


def adagc_by_hand(series, *, max_norm, warmup, ratio=1.05, decay=0.98):
    running, factors = [math.inf] * len(series[0]), []
    for step, norms in enumerate(series):
        total = math.sqrt(sum(value * value for value in norms))
        now = []
        for index, value in enumerate(norms):
            if step < warmup:
                factor = min(1.0, max_norm / (total + 1e-6))
                running[index] = min(running[index], value * factor)
            else:
                factor = min(1.0, ratio * running[index] / value)
                running[index] = decay * running[index] + (1 - decay) * value * factor
            now.append(factor)
        factors.append(now)
    return factors, running


def test_adagc_follows_its_paper():
    series = noisy(120, at=(5, 60, 61, 90))
    factors, state = drive(AdaGC(0.5, warmup=20), series)
    expected, running = adagc_by_hand(series, max_norm=0.5, warmup=20)
    assert torch.allclose(torch.tensor(factors), torch.tensor(expected), rtol=1e-4)
    assert state["norm_P"].tolist() == pytest.approx(running, rel=1e-4)
    assert state["count"].item() == 120


def test_adagc_bounds_the_tensor_that_spikes_and_no_other():
    factors, _ = drive(AdaGC(10.0, warmup=20), noisy(60, at=(50,), centre=(0.3, 0.05, 0.05)))
    steady, _ = drive(AdaGC(10.0, warmup=20), noisy(60, centre=(0.3, 0.05, 0.05)))
    assert factors[50][0] < 0.03
    assert factors[50][1:] == steady[50][1:]
    assert factors[51][0] > 0.8  # one spike of 50 times does not lift the bound by more than a part in a thousand
    # Negative control: the global bound takes the other tensors down with it.
    together, _ = drive(GlobalClip(1.0), noisy(60, at=(50,), centre=(0.3, 0.05, 0.05)))
    assert together[50][1] < 0.1


def test_adagc_does_not_learn_from_a_zero_gradient():
    # Unlike the paper's minimum, which a zero during the warm-up would pin at zero: the tensor could never move again.
    series = [[0.0, 1.0]] * 5 + [[1e-3, 1.0]] * 20
    factors, state = drive(AdaGC(10.0, warmup=10), series)
    assert all(factor == 1 for pair in factors for factor in pair)
    assert state["norm_P"].tolist() == pytest.approx([1e-3, 1.0])
    late, state = drive(AdaGC(10.0, warmup=3), [[0.0, 1.0]] * 5 + [[7.0, 1.0]])
    assert late[-1] == [1.0, 1.0]
    assert state["norm_P"].tolist() == pytest.approx([7.0, 1.0])


def zclip_by_hand(series, *, max_norm, warmup, threshold=2.5, decay=0.97):
    totals = [math.sqrt(sum(value * value for value in norms)) for norms in series]
    mean = sum(totals[:warmup]) / warmup
    variance = sum((total - mean) ** 2 for total in totals[:warmup]) / warmup
    factors = [min(1.0, max_norm / (total + 1e-6)) for total in totals[:warmup]]
    for total in totals[warmup:]:
        deviation, clipped = math.sqrt(variance), total
        score = (total - mean) / (deviation + 1e-6)
        if score > threshold:
            clipped = mean + threshold**2 / score * deviation
        factors.append(clipped / total)
        mean = decay * mean + (1 - decay) * clipped
        variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
    return factors, mean, variance


def test_zclip_follows_its_paper():
    series = noisy(120, at=(40, 70, 71))
    factors, state = drive(ZClip(0.5), series)
    expected, mean, variance = zclip_by_hand(series, max_norm=0.5, warmup=25)
    assert [row[0] for row in factors] == pytest.approx(expected, rel=1e-4)
    assert state["mean"].item() == pytest.approx(mean, rel=1e-4)
    assert state["variance"].item() == pytest.approx(variance, rel=1e-3)
    assert sum(factor < 1 for factor in expected[25:]) >= 3


def test_zclip_brings_the_further_outlier_nearer_to_the_mean():
    after = {}
    for size in (3.0, 100.0):
        series = noisy(41, at=(40,), size=size)
        factors, _ = drive(ZClip(10.0), series)
        after[size] = factors[40][0] * math.hypot(*series[40])
    assert after[100.0] < after[3.0]
    assert after[100.0] == pytest.approx(0.67, abs=0.05)  # the mean norm of this series
