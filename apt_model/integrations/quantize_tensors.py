"""Tensors from one folder into another, copied or quantised a slab at a time.

# Shape suffix legend
#   N = output features, K = input features, R = rows of a slab
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from apt_model.core.errors import CheckpointError, InputError
from apt_model.core.fp4_storage import GLOBAL_SCALE, PACKED, SCALE
from apt_model.core.tensor_files import TensorWriter, read_piece
from apt_model.core.tensor_folders import TensorFolder
from apt_model.core.tensor_io import as_bytes, read_rows, read_tensor
from apt_model.integrations.fp4_plan import Decision
from apt_model.ops.fp4 import PackedWeight, dequantize, quantize
from apt_model.ops.fp4.format import Format

# Weights in hand at once; the quantiser keeps some tens of bytes for each.
SLAB_WEIGHTS = 2**20
_COPY_BYTES = 2**22

OnBytes = Callable[[int, str], None]
"""Hears how many more bytes of the source are done, and of which tensor."""


class TensorWork:
    """Does what was decided; `errors` has each converted weight's squared error over its squared values."""

    def __init__(
        self,
        tensors: TensorFolder,
        decisions: Iterable[Decision],
        form: Format,
        device: torch.device,
        on_bytes: OnBytes | None,
    ) -> None:
        self.tensors, self.form, self.device = tensors, form, device
        self.on_bytes = on_bytes or (lambda _count, _name: None)
        self.errors: dict[str, float] = {}
        self._groups: dict[str, list[Decision]] = {}
        self._largest: dict[str, Tensor] = {}
        for each in decisions:
            if each.converted:
                self._groups.setdefault(each.group, []).append(each)

    def copy(self, decision: Decision, writer: TensorWriter) -> None:
        """Byte for byte, under its new name where it has one."""
        entry, path = decision.entry, self.tensors.homes[decision.name]
        self.on_bytes(0, decision.name)
        if decision.target == "":
            return
        target = decision.target or decision.name
        if decision.inverted:
            writer.write(target, as_bytes(1 / read_tensor(path, entry)))
            return
        buffer = memoryview(bytearray(min(_COPY_BYTES, entry.size)))
        for offset in range(0, entry.size, _COPY_BYTES):
            piece = buffer[: entry.size - offset]
            read_piece(path, entry, offset, piece)
            writer.write(target, piece, offset)
            self.on_bytes(len(piece), decision.name)

    def convert(self, decision: Decision, writer: TensorWriter) -> None:
        """Quantise, write, and note the error."""
        lost, whole, done = 0.0, 0.0, dict.fromkeys(decision.outputs(self.form), 0)

        def put(suffix: str, tensor: Tensor) -> None:
            data, name = as_bytes(tensor.cpu().contiguous()), decision.name + suffix
            writer.write(name, data, done[name])
            done[name] += len(data)

        for expert in range(math.prod(decision.shape[:-2])):
            largest = self._largest_of(decision, expert) if self.form.has_global_scale else None
            global_scale = None
            for rows in self._slabs(decision, expert):
                packed = self._quantize(decision, rows, largest)
                wide, global_scale = rows.to(torch.float32), packed.global_scale
                lost += float((dequantize(packed, torch.float32) - wide).square().sum(dtype=torch.float64))
                whole += float(wide.square().sum(dtype=torch.float64))
                put(PACKED, packed.packed)
                put(SCALE, packed.scale)
                self.on_bytes(rows.numel() * rows.itemsize, decision.name)
            if global_scale is not None:
                put(GLOBAL_SCALE, global_scale)
        self.errors[decision.name] = lost / whole if whole else 0.0

    def _quantize(self, decision: Decision, rows: Tensor, largest: Tensor | None) -> PackedWeight:
        """[R, K], with the global scale of a weight whose largest magnitude is `largest`."""
        try:
            return quantize(rows, self.form.name, amax=largest)
        except InputError as error:
            raise CheckpointError(f"{self.tensors.folder}: {decision.name}: {error.message}") from error

    def _largest_of(self, decision: Decision, expert: int) -> Tensor:
        """The largest magnitude of an expert's matrix, or of all matrices of a group."""
        if len(decision.shape) > 2:
            return self._largest_in([decision], expert)
        if decision.group not in self._largest:
            self._largest[decision.group] = self._largest_in(self._groups[decision.group], expert)
        return self._largest[decision.group]

    def _largest_in(self, members: list[Decision], expert: int) -> Tensor:
        found = []
        for member in members:
            for rows in self._slabs(member, expert):
                found.append(torch.maximum(rows.amax(), -rows.amin()))
                self.on_bytes(0, member.name)
        return torch.stack(found).amax()

    def _slabs(self, decision: Decision, expert: int) -> Iterator[Tensor]:
        """Slabs [R, K] of an expert's matrix, on the device; one with inputs first is read whole."""
        entry, path = decision.entry, self.tensors.homes[decision.name]
        height, width = entry.shape[-2:]
        begin = expert * height
        if decision.transposed:
            whole = read_rows(path, entry, begin, height).to(self.device).T.contiguous()
            yield from whole.split(max(1, SLAB_WEIGHTS // height))
            return
        step = max(1, SLAB_WEIGHTS // width)
        for first in range(0, height, step):
            yield read_rows(path, entry, begin + first, min(step, height - first)).to(self.device)
