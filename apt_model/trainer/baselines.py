"""What general-purpose compressors make of a text: the yardstick beside a model's bits per byte. Imports no torch."""

import gzip
import lzma
from collections.abc import Sequence

from apt_model.core.errors import InputError


def compressed_bits_per_byte(texts: Sequence[str]) -> dict[str, float]:
    """Bits that `gzip -9` and `xz -9e` need for each byte of the texts, concatenated as UTF-8.

    Both start without having seen anything, headers included, so a short text costs them more than a long one.
    Raises `InputError` when the texts hold nothing.
    """
    data = "".join(texts).encode("utf-8")
    if not data:
        raise InputError("compressed_bits_per_byte: expected text, got none", remedy="pass the held-out documents")
    return {
        "gzip": 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }
