"""A model taken apart to fit, packed to blobs and planned: the same for a model in memory and for a saved one. Pure."""

import dataclasses
from collections.abc import Callable

from apt_model.core.errors import CapacityError
from apt_model.vgpu.planner import DEVICE, Blob, Capacities, Plan, plan
from apt_model.vgpu.policy import CYCLIC
from apt_model.vgpu.tree import Node, Stored
from apt_model.vgpu.units import padded
from apt_model.vgpu.windows import Found, Window, find

# Of a tensor's first byte: what copies and kernels like.
_ALIGNED = 256
# How often blocks are taken apart further where level 1 is too small for them.
_HALVINGS = 12


@dataclasses.dataclass(eq=False)
class Packing:
    """Storages that move together, and where each begins."""

    name: str
    nbytes: int
    stored: list[tuple[Stored, int]]


def pack(name: str, stored: list[Stored]) -> Packing:
    """Lay storages side by side."""
    at, places = 0, []
    for each in stored:
        places.append((each, at))
        at = padded(at + each.nbytes, _ALIGNED)
    return Packing(name, max(at, _ALIGNED), places)


class Layout:
    """A model taken apart to fit, and the plan for it."""

    def __init__(
        self, found: Found, buffers: int, capacities: Capacities, slots: int, in_files: Callable[[Packing], bool], *,
        policy: str,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.found = found
        self.windows: list[Window] = found.windows
        self.blobs: list[Packing] = []
        self.needs: list[list[int]] = [[] for _ in found.windows]
        shared: dict[Stored, int] = {}
        for i, window in enumerate(found.windows):
            own = [each for each in window.stored if found.users[each] == 1]
            if own:
                self._add(i, window.name, own)
            for each in window.stored:
                if found.users[each] > 1:
                    if each not in shared:
                        shared[each] = len(self.blobs)
                        self.blobs.append(pack(each.name, [each]))
                    self.needs[i].append(shared[each])
        self.chunk = self.spare = 0
        """What files of others are read by, and bytes of host memory that this takes."""
        self.loose = pack("what lies around the blocks", found.loose)
        self.buffers = padded(buffers)
        always = self.buffers + (padded(self.loose.nbytes) if found.loose else 0)
        self.plan: Plan = plan(
            [Blob(name=each.name, nbytes=each.nbytes, in_files=in_files(each)) for each in self.blobs], capacities,
            always=always, slots=slots, at_once=max(map(len, self.needs), default=1), cached=policy != CYCLIC,
        )  # fmt: skip

    @property
    def streamed(self) -> list[int]:
        """Blobs that do not stay on level 1."""
        return [i for i, home in enumerate(self.plan.homes) if home != DEVICE]

    def _add(self, window: int, name: str, stored: list[Stored]) -> None:
        self.needs[window].append(len(self.blobs))
        self.blobs.append(pack(name, stored))


def lay_out(
    root: Node, buffers: int, capacities: Capacities, slots: int,
    in_files: Callable[[Packing], bool] = lambda _: False, *, policy: str = CYCLIC,
) -> Layout:  # fmt: skip
    """Take a model apart into the largest blocks with which all slots fit; `CapacityError` where none do.

    Args:
        root: the model.
        buffers: bytes of its buffers, which stay on level 1.
        capacities: of the levels.
        slots: places on level 1 that are asked for.
        in_files: whether a blob's bytes lie in files already.
        policy: as `VGPUConfig` has it.
    """
    room = capacities.device
    total = sum(each.nbytes for each in find(root, 0).stored)
    limit = room if total + buffers <= room else (room - padded(buffers)) // slots
    best: Layout | None = None
    fault: CapacityError | None = None
    before: list[Node] | None = None
    for _ in range(_HALVINGS):
        found = find(root, limit, inner=policy != CYCLIC)
        limit //= 2
        nodes = [window.node for window in found.windows]
        if nodes == before:  # as before: nothing can be taken apart further
            continue
        before = nodes
        try:
            layout = Layout(found, buffers, capacities, slots, in_files, policy=policy)
        except CapacityError as error:
            fault = error
        else:
            if best is None or layout.plan.slots > best.plan.slots:
                best = layout
            if not layout.plan.slots or layout.plan.slots >= min(slots, len(layout.streamed)):
                return layout
    if best is None:
        assert fault is not None
        try:
            raise fault
        finally:
            del fault  # whose frames know this one, and that the model
    return best
