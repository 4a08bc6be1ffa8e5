"""Low-rank compression of gradient matrices with error feedback (DBC-DAC); the maths is in README.md."""

from apt_model.ops.low_rank.naive import Compressed, compress, random_basis, refresh_basis

__all__ = ["Compressed", "compress", "random_basis", "refresh_basis"]
