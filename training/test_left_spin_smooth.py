"""Show what left spin does, with numbers measured in this run; leaves with an error if something it checks is not so.

python training/test_left_spin_smooth.py

Runs in less than a minute on two CPU cores, from nothing but this repository and the Python installation.
"""

import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.layers.left_spin import LeftSpinResidual, PlainResidual
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration
from apt_model.ops.left_spin.naive import EPS, design_gate, design_step, trust_gate

WIDTH, LAYERS, CONTEXT, BATCH, STEPS = 64, 6, 64, 8, 80
SUBLAYERS = 2 * LAYERS
RATES = (1e-3, 4e-3, 1.6e-2)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"use_left_spin": False},
    "design": {"left_spin_mode": "design"},
    # Trust with a gate too weak to act: what its learned branch scale does alone (LayerScale).
    "branch scale": {"left_spin_mode": "trust", "left_spin_alpha": 1e-6},
    "trust": {"left_spin_mode": "trust"},
}
failed: list[str] = []


def check(claim: str, measured: str, holds: bool) -> None:
    """Print one claim with what was measured, and remember it if it does not hold."""
    print(f"  {'holds' if holds else 'FAILS'}  {claim}: {measured}")
    if not holds:
        failed.append(claim)


def steps_of_all_lengths() -> tuple[Tensor, Tensor, Tensor]:
    """Streams, steps and their relative lengths, 1e-3 to 1e3."""
    u, direction = torch.randn(2, 4000, WIDTH, dtype=torch.float64)
    relative = torch.logspace(-3, 3, 4000, dtype=torch.float64)[:, None]
    length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return u, relative * length * direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True), relative[:, 0]


def show_properties() -> None:
    print("\n1. The formulas, on 4000 random tokens with steps of 0.001 to 1000 times the stream")
    u, delta, relative = steps_of_all_lengths()
    alpha, tau = 2.0, 0.4
    radius = (u.square().sum(dim=-1) + EPS * WIDTH).sqrt() / alpha
    for mode, threshold in (("trust", 0.0), ("guard", tau)):
        step = trust_gate(u, delta, alpha=alpha, tau=threshold)[:, 0] * torch.linalg.vector_norm(delta, dim=-1)
        longest = float((step / radius).max())
        check(f"{mode}: |g v| < |u| / {alpha:g}", f"the longest step is {1 - longest:.0e} short of it", longest < 1)
        falls = float((step / torch.linalg.vector_norm(u, dim=-1)).diff().min())
        check(f"{mode}: a longer increment never makes a shorter step", f"smallest change {falls:.0e}", falls > -1e-6)
    stepped, _ = design_step(u, delta, None, None, alpha=4.0, tau=0.3, beta=1.0, w1=1.0, w2=0.5)
    taken = torch.linalg.vector_norm(stepped - u, dim=-1) / torch.linalg.vector_norm(u, dim=-1)
    overshoots = 0.25 < float(taken.max()) < 0.3
    check(
        "design overshoots its limit of 0.25 (alpha 4), as is known of it", f"{float(taken.max()):.4f} |u|", overshoots
    )
    residuals = {
        mode: LeftSpinResidual(WIDTH, mode=mode, num_sublayers=SUBLAYERS) for mode in ("design", "trust", "guard")
    }
    identical = [mode for mode, residual in residuals.items() if torch.equal(residual(u, torch.zeros_like(u))[0], u)]
    check("no increment, no change, bit for bit", ", ".join(identical), len(identical) == len(residuals))
    inside = relative < 0.99 * residuals["guard"].tau
    for dtype in (torch.float32, torch.bfloat16):
        stream, step = u[inside].to(dtype), delta[inside].to(dtype)
        same = torch.equal(residuals["guard"](stream, step)[0], PlainResidual()(stream, step)[0])
        check(f"guard equals the plain residual below tau, {dtype}", f"{int(inside.sum())} tokens bit for bit", same)


def text_of_the_standard_library() -> Tensor:
    """Bytes of the source of this Python's own modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def draw(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of bytes and of the bytes after them, [BATCH, CONTEXT] each."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    window = text[starts + torch.arange(CONTEXT + 1)].long()
    return window[:, :-1], window[:, 1:]


def build(norm_position: str, **options: Any) -> APTModel:
    """A byte model from seed 0."""
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "d_model": WIDTH, "num_heads": 4, "d_ff": 4 * WIDTH, "max_seq_len": CONTEXT}
    depth = {"num_decoder_layers": LAYERS, "decoder_only": True, "norm_position": norm_position}
    return APTModel(APTModelConfiguration.from_dict({**shape, **depth, "use_autopoietic": False, **options}))


def gates_of(model: APTModel, ids: Tensor) -> list[Tensor]:
    """The gate of every token at every sublayer, in order."""
    gates: list[Tensor] = []

    def record(residual: LeftSpinResidual, inputs: tuple[Any, ...], _: object) -> None:
        u, delta, state = inputs
        if residual.scale is not None:
            gates.append(trust_gate(u, residual.scale * delta, alpha=residual.alpha))
            return
        settings = {name: getattr(residual, name) for name in ("alpha", "tau", "beta", "w1", "w2")}
        gates.append(design_gate(u, delta, *(state or (None, None)), **settings)[0])

    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, LeftSpinResidual)]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return gates


def show_gates(text: Tensor) -> None:
    print(f"\n2. Gates in a new pre-norm model of {SUBLAYERS} sublayers, on real text: mean (spread between tokens)")
    ids, _ = draw(text, torch.Generator().manual_seed(0))
    for mode in ("design", "trust"):
        gates = gates_of(build("pre", left_spin_mode=mode), ids)
        print(f"  {mode:7}" + " ".join(f"{float(g.mean()):.3f}({float(g.std()):.3f})" for g in gates))
        check(
            f"{mode}: every gate is above 0 and at most 1", f"{len(gates)} sublayers", all(_is_gate(g) for g in gates)
        )


def _is_gate(gate: Tensor) -> bool:
    return bool(((gate > 0) & (gate <= 1)).all())


def train(options: dict[str, Any], rate: float, text: Tensor) -> float:
    """Held-out loss in nats a byte after a short post-norm run without warm-up or clipping."""
    model, generator, cut = build("post", **options), torch.Generator().manual_seed(0), int(0.95 * len(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.55 + 0.45 * math.cos(math.pi * n / STEPS))
    for _ in range(STEPS):
        ids, target = draw(text[:cut], generator)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        batches = [draw(text[cut:], generator) for _ in range(16)]
        losses = [F.cross_entropy(model(ids).flatten(0, 1), target.flatten()) for ids, target in batches]
    return float(torch.stack(losses).mean())


def show_stability(text: Tensor) -> None:
    size = build("post", **ARMS["plain"]).num_parameters()
    print(
        f"\n3. Post-norm, no warm-up, no clipping: held-out nats a byte after {STEPS} steps of {BATCH * CONTEXT} bytes"
    )
    print(f"   ({size / 1e6:.2f} M parameters, one seed)")
    losses = {(arm, rate): train(options, rate, text) for rate in RATES for arm, options in ARMS.items()}
    print(f"  {'learning rate':14}" + "".join(f"{rate:>10g}" for rate in RATES))
    for arm in ARMS:
        print(f"  {arm:14}" + "".join(f"{losses[arm, rate]:10.3f}" for rate in RATES))
    plain, trust = losses["plain", RATES[-1]], losses["trust", RATES[-1]]
    check("every loss is finite", f"{len(losses)} runs", all(map(math.isfinite, losses.values())))
    check(f"at {RATES[-1]:g} trust still learns where plain does not", f"{trust:.3f}, {plain:.3f}", trust < plain - 0.3)


def main() -> int:
    started = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    text = text_of_the_standard_library()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, {len(text) / 1e6:.1f} MB of text")
    show_properties()
    show_gates(text)
    show_stability(text)
    print(
        f"\n{time.perf_counter() - started:.0f} s. "
        + (f"Failed: {'; '.join(failed)}" if failed else "All checks hold.")
    )
    print("A model this small and a run this short say nothing about gains at scale.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
