"""The training loop that the project promises to run unchanged, and the example that shows it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import apt_model.optimization.vb_global as vb
from apt_model.core.policy import Policy
from apt_model.core.system import get_device
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration

EXAMPLE = Path(__file__).parents[2] / "examples" / "mission_training.py"
MISSION = {
    "vocab_size": 30522, "d_model": 768, "num_encoder_layers": 12, "num_decoder_layers": 12, "num_heads": 12,
    "d_ff": 3072,
}  # fmt: skip
SMALL = {
    "vocab_size": 61, "d_model": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_ff": 64,
}  # fmt: skip


def configuration(sizes):
    return APTModelConfiguration(
        **sizes,
        use_autopoietic=True,
        use_dbc_dac=True,
        use_left_spin=True,
        left_spin_alpha=0.5,
        left_spin_tau=0.3,
        left_spin_beta=0.7,
    )


@pytest.fixture
def balanced(capfd):
    vb.enable_balanced_mode(verbose=True)
    assert "balanced mode" in capfd.readouterr().err
    yield
    vb.disable()


def copies(count, vocab_size, device):
    """Batches whose target is the source backwards: nothing to learn but the task."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        src_tokens = torch.randint(3, vocab_size, (16, 6), generator=draw)
        start = torch.ones(16, 1, dtype=torch.int64)
        yield src_tokens.to(device), torch.cat([start, src_tokens.flip(1)], dim=1).to(device)


def test_the_loop_as_it_stands(balanced):
    config = configuration(SMALL)
    batches = list(copies(60, 61, get_device()))
    losses = []
    torch.manual_seed(0)

    model = APTModel(config)
    device = get_device()
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    criterion = torch.nn.CrossEntropyLoss()
    for src_tokens, tgt_tokens in batches:
        optimizer.zero_grad()
        output = model(src_tokens, tgt_tokens[:, :-1])
        loss = criterion(output.view(-1, output.size(-1)), tgt_tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert model.policy == Policy(mode="balanced")
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.25
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_disabling_leaves_new_models_plain(balanced):
    vb.disable()
    assert APTModel(configuration(SMALL)).policy is None


def test_the_full_size():
    """On the meta device, which takes no memory; the parameters are counted by hand."""
    config = configuration(MISSION)
    with torch.device("meta"):
        model = APTModel(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    width, rank, heads = 768, 192, 12
    own = (4 * width + rank + heads) * width + rank * width + 3 * heads
    across = own  # its query lies beside the term's rows, its key and value in a matrix of their own
    padded = -(3 * width + rank + heads) % 8 * width, -(width + rank + heads) % 8 * width
    forward = 2 * width * 3072
    encoder = 12 * (own + padded[0] + forward + 2 * width)
    decoder = 12 * (own + padded[0] + across + padded[1] + forward + 3 * width)
    assert model.num_parameters() == 2 * 30522 * width + encoder + decoder + 2 * width


def test_the_example_runs_and_learns(tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "balanced mode" in done.stderr
    first, last = (float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("loss of the "))
    assert last < first - 1
    assert not list(tmp_path.iterdir())
