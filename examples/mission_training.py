"""Train an APT encoder-decoder with a loop of your own: plain PyTorch, no trainer of ours.

    python examples/mission_training.py        # some seconds on a CPU, no download

The text is Python's own: the functions of `asyncio` are the sources, the first lines of their docstrings the targets.
The model is small; the construction at full size is the same call with larger numbers (768 wide, 12 + 12 layers).
"""

import asyncio
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import apt_model.optimization.vb_global as vb
from apt_model.core.system import get_device
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer.config import DataConfig
from apt_model.trainer.corpus import Pair, read_corpus

STEPS, BATCH, SOURCE, TARGET = 150, 16, 48, 16


def make_batches(pairs: Sequence[Pair], tokenizer: Tokenizer, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: sources [B, S], padded, and targets [B, T] of one length, so that no loss is of padding."""
    by_length = defaultdict(list)
    for pair in pairs:
        target = [tokenizer.bos_id, *tokenizer.encode(pair.target), tokenizer.eos_id][:TARGET]
        by_length[len(target)].append((torch.tensor(tokenizer.encode(pair.source)[:SOURCE]), torch.tensor(target)))
    draw = random.Random(0)
    lengths = sorted(by_length)
    weights = [len(by_length[length]) for length in lengths]
    while True:
        sources, targets = zip(*draw.choices(by_length[draw.choices(lengths, weights)[0]], k=BATCH), strict=True)
        padded = pad_sequence(list(sources), batch_first=True, padding_value=tokenizer.pad_id)
        yield padded.to(device), torch.stack(targets).to(device)


def main() -> int:
    """Train, and show what the model says of functions that it has not seen; 1 when the loss did not fall."""
    torch.manual_seed(0)
    begin = time.monotonic()
    corpus = read_corpus(DataConfig(source=str(Path(asyncio.__file__).parent), task="seq2seq", holdout=0.1))
    train, heldout = ([item for item in side if isinstance(item, Pair)] for side in (corpus.train, corpus.heldout))
    tokenizer = Tokenizer.train((text for pair in train for text in (pair.source, pair.target)), 512)

    # One line enables what this machine offers: models built from here on follow it.
    vb.enable_balanced_mode(verbose=True)

    config = APTModelConfiguration(
        vocab_size=512,
        d_model=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        d_ff=128,
        max_seq_len=64,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        use_autopoietic=True,
        use_dbc_dac=True,
        use_left_spin=True,
        left_spin_alpha=0.5,
        left_spin_tau=0.3,
        left_spin_beta=0.7,
    )
    model = APTModel(config)
    device = get_device()
    model = model.to(device)
    batches = make_batches(train, tokenizer, device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    criterion = torch.nn.CrossEntropyLoss()
    losses = []
    for _, (src_tokens, tgt_tokens) in zip(range(STEPS), batches, strict=False):
        optimizer.zero_grad()
        output = model(src_tokens, tgt_tokens[:, :-1])
        loss = criterion(output.view(-1, output.size(-1)), tgt_tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    figures = [float(loss) for loss in losses]
    first, last = sum(figures[:10]) / 10, sum(figures[-10:]) / 10
    print(f"{model.num_parameters():,} parameters, {len(train)} pairs, {time.monotonic() - begin:.1f} s")
    print(f"loss of the first ten steps, nats a token: {first:.3f}")
    print(f"loss of the last ten steps, nats a token: {last:.3f}")
    for pair in heldout[:3]:
        source = torch.tensor([tokenizer.encode(pair.source)[:SOURCE]], device=device)
        written = tokenizer.decode(model.generate(source, max_new_tokens=TARGET)[0].tolist())
        print(f"{pair.name}\n  docstring  {pair.target}\n  model      {written}")
    vb.disable()
    return 0 if last < first else 1


if __name__ == "__main__":
    sys.exit(main())
