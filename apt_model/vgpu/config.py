"""What a stack is made of: levels of memory with hard capacities, the fastest first."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from apt_model.core.errors import ConfigError
from apt_model.core.options import require, unknown_name
from apt_model.vgpu.policy import CYCLIC, POLICIES
from apt_model.vgpu.units import MB

DISK, HOST = "ssd", "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level: what may be held there, and where that is.

    Args:
        capacity_mb: most that is held there at once, staging included, in MB of 10^6 bytes.
        device: "cuda:0" and the like, "cpu" or "ssd".
        speed_gbps: what reaches the level above in a second, in GB; None: measured when it is asked for.
        path: the folder of an "ssd"; None: a temporary one, removed with the stack.
    """

    capacity_mb: float
    device: str
    speed_gbps: float | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        where = f"level {self.device!r}"
        number = isinstance(self.capacity_mb, int | float) and not isinstance(self.capacity_mb, bool)
        require(number and self.capacity_mb > 0, f"{where}: capacity_mb", "MB above 0", self.capacity_mb)
        speed = self.speed_gbps
        require(
            speed is None or (isinstance(speed, int | float) and speed > 0), f"{where}: speed_gbps",
            "GB/s above 0, or None to have it measured", speed,
        )  # fmt: skip
        known = isinstance(self.device, str) and re.fullmatch(r"[a-z]+(:\d+)?", self.device)
        require(bool(known), "level: device", "'cuda:0' and the like, 'cpu' or 'ssd'", self.device)
        require(self.path is None or self.device == DISK, f"{where}: path", "None, as only 'ssd' has files", self.path)

    @property
    def capacity(self) -> int:
        """In bytes."""
        return int(self.capacity_mb * MB)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VGPUConfig:
    """The levels of a stack, and how models are streamed through the first.

    Args:
        levels: the first computes; below an accelerator comes "cpu", and "ssd" comes last. "cpu" may be the first.
        slots: places on level 1 that streamed blocks pass through; fewer where the capacity holds no more.
        policy: "cyclic" for blocks that come in an order which repeats: some stay on level 1, and the others are
            brought ahead of their use. "lru" and "frequency" for an order that cannot be foreseen (experts, adapters):
            nothing is brought ahead, level 1 is all slots, at least `slots`, in which blocks stay until others need
            the room, those used longest ago or least often first; lists of modules within blocks are taken apart.
    """

    levels: tuple[LevelConfig, ...]
    slots: int = 3
    policy: str = CYCLIC

    def __post_init__(self) -> None:
        kinds = [level.device for level in self.levels]
        require(bool(kinds), "VGPUStack: levels", "at least one", kinds)
        require(kinds[0] != DISK, "VGPUStack: level 1", "a device that computes", kinds[0])
        below = kinds[1:]
        require(
            below in ([], [HOST], [DISK], [HOST, DISK]), "VGPUStack: levels below the first",
            "'cpu', 'ssd', or 'cpu' and then 'ssd'", below,
        )  # fmt: skip
        require(
            kinds[0] == HOST or below != [DISK], "VGPUStack: levels", "a 'cpu' level between an accelerator and 'ssd', "
            "through which it reaches the disk", kinds,
        )  # fmt: skip
        require(
            isinstance(self.slots, int) and self.slots > 0, "VGPUStack: slots", "a whole number above 0", self.slots
        )
        require(self.policy in POLICIES, "VGPUStack: policy", " or ".join(map(repr, POLICIES)), self.policy)

    @classmethod
    def of(cls, config: "VGPUConfig | Mapping[str, Any]") -> "VGPUConfig":
        """The configuration as it is, or of a dictionary, whose levels are dictionaries too."""
        if isinstance(config, cls):
            return config
        if not isinstance(config, Mapping) or not isinstance(config.get("levels"), list | tuple):
            raise ConfigError(
                f"VGPUStack: expected a dictionary with a list of 'levels', got {config!r}",
                remedy='for one: {"levels": [{"capacity_mb": 2000, "device": "cuda:0"}, {"capacity_mb": 8000, '
                '"device": "cpu"}]}',
            )
        levels = tuple(_made(LevelConfig, level, f"level {i + 1}") for i, level in enumerate(config["levels"]))
        return _made(cls, {**config, "levels": levels}, "VGPUStack")


def _made(kind: Any, given: object, where: str) -> Any:
    """A dataclass of a dictionary, whose names are looked at."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a dictionary, got {given!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in given:
        if name not in fields:
            raise unknown_name(str(name), fields, where)
    missing = [name for name, f in fields.items() if name not in given and f.default is dataclasses.MISSING]
    require(not missing, where, f"a value for {' and '.join(missing)}", dict(given))
    return kind(**given)
