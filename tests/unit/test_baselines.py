"""Compressors as a yardstick."""

import gzip
import random

import pytest

from apt_model.core.errors import InputError
from apt_model.trainer.baselines import compressed_bits_per_byte


def test_repetition_costs_little_and_noise_costs_all_of_it():
    assert all(bits < 0.1 for bits in compressed_bits_per_byte(["ab" * 10_000]).values())
    draw = random.Random(0)
    noise = bytes(draw.randrange(128) for _ in range(20_000)).decode()
    assert all(6.9 < bits < 7.5 for bits in compressed_bits_per_byte([noise]).values())


def test_bytes_are_counted_over_the_concatenation_as_utf8():
    texts = ["na\u00efve " * 50, "caf\u00e9 " * 50]
    data = "".join(texts).encode()
    bits = compressed_bits_per_byte(texts)
    assert bits["gzip"] == 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    assert bits == compressed_bits_per_byte(["".join(texts)])
    assert list(bits) == ["gzip", "xz"]


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_compress_is_refused(texts):
    with pytest.raises(InputError, match="expected text, got none"):
        compressed_bits_per_byte(texts)
