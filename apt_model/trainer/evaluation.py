"""How well a model predicts held-out text, in bits per byte: the same unit for every tokenizer, and for gzip."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.core.system.device import Device
from apt_model.core.system.manager import get_device_manager
from apt_model.modeling.apt_model import APTModel
from apt_model.trainer.data import IGNORED, Batch, TokenData


class Evaluation(NamedTuple):
    """Sums over the tokens scored: their information in nats, their number, and the bytes of text they stand for."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Information in bits over bytes; ends of text count as information and as no bytes."""
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy."""
        return self.nats / self.tokens


def token_nats(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over the labelled positions of -log p(label), fp32, a scalar."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def in_bf16(precision: str, manager: Device) -> bool:
    """Whether a run's `precision` is bf16 on this device; 'auto' follows what the device multiplies natively."""
    return precision == "bf16" or (precision == "auto" and manager.supports_bf16())


def autocast(device: torch.device, *, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """The context that a model runs in: bf16 autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def count_targets(batch: Batch) -> int:
    """Positions of the batch that have a label."""
    return int((batch.labels != IGNORED).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied without waiting where the device can."""
    if device.type == "cpu":
        return batch
    pin = get_device_manager(device).pin
    inputs = tuple(pin(ids).to(device, non_blocking=True) for ids in batch.inputs)
    return Batch(inputs, pin(batch.labels).to(device, non_blocking=True))


@torch.no_grad()
def evaluate(
    model: APTModel,
    data: TokenData,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score held-out text, all of it or `max_tokens` spread over the whole; `on_batch` hears the tokens so far."""
    device = model.embedding.weight.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = size = 0
    was_training = model.training
    model.eval()
    try:
        for batch in data.heldout_batches(batch_size, max_tokens):
            tokens, size = tokens + count_targets(batch), size + data.count_bytes(batch.labels)
            batch = to_device(batch, device)  # noqa: PLW2901 - the same batch, elsewhere
            with autocast():
                nats += token_nats(model(*batch.inputs), batch.labels)
            if on_batch is not None:
                on_batch(tokens)
    finally:
        model.train(was_training)
    return Evaluation(float(nats), tokens, size)
