"""What is installed, from names of files and their metadata alone: nothing is imported."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;\s*(.*))?$")
_CLAUSE = re.compile(r"(===|==|~=|!=|<=|>=|<|>)\s*([^\s,]+)")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


class Requirement(NamedTuple):
    """What a package needs of another one."""

    name: str
    versions: str  # "<3,>=2.1", empty: any
    extra: str | None  # only for this extra
    marker: str  # the whole condition, empty: always


class Package(NamedTuple):
    """One `.dist-info` folder."""

    name: str
    version: str
    info: Path

    @property
    def site(self) -> Path:
        """The folder it is installed in."""
        return self.info.parent

    def text(self, file: str) -> str:
        """A file of its metadata, empty where there is none."""
        try:
            return (self.info / file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def field(self, name: str) -> str:
        """The first value of a header of METADATA."""
        return next(iter(self._headers(name)), "")

    def requirements(self) -> Iterator[Requirement]:
        """What it needs, for all extras and all systems."""
        for line in self._headers("Requires-Dist"):
            match = _REQUIREMENT.match(line)
            if match:
                marker = (match[3] or "").strip()
                extra = _EXTRA.search(marker)
                yield Requirement(normal(match[1]), match[2].strip(), extra[1] if extra else None, marker)

    def entry_points(self, group: str) -> Iterator[tuple[str, str]]:
        """Name and object reference of each entry point of the group."""
        inside = False
        for line in self.text("entry_points.txt").splitlines():
            if line.startswith("["):
                inside = line.strip() == f"[{group}]"
            elif inside and "=" in line:
                name, _, value = line.partition("=")
                yield name.strip(), value.strip()

    def _headers(self, name: str) -> list[str]:
        head = self.text("METADATA").partition("\n\n")[0]
        return re.findall(rf"^{re.escape(name)}:\s*(.*)$", head, flags=re.MULTILINE)


class Torch(NamedTuple):
    """A torch, by its own version.py: what it was built for, None for what it was not."""

    folder: Path
    version: str
    cuda: str | None
    hip: str | None
    xpu: str | None

    @property
    def build(self) -> str:
        """In words."""
        named = (("CUDA", self.cuda), ("ROCm", self.hip), ("XPU", self.xpu))
        return next((f"{name} {version}" for name, version in named if version), "CPU")


class Packages:
    """The packages of some folders, in the order in which Python looks there."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._folders = [Path(path or ".") for path in dict.fromkeys(paths)]

    @functools.cached_property
    def all(self) -> list[Package]:
        """Every one, those that are hidden by an earlier one included."""
        found = []
        for folder in self._folders:
            if folder.is_dir():
                for info in sorted(folder.glob("*.dist-info")):
                    name, _, version = info.name.removesuffix(".dist-info").partition("-")
                    found.append(Package(normal(name), version, info))
        return found

    def named(self, name: str) -> list[Package]:
        """Those of a name, the one that counts first."""
        return [package for package in self.all if package.name == normal(name)]

    def get(self, name: str) -> Package | None:
        """The one that counts."""
        return next(iter(self.named(name)), None)

    def modules(self, name: str) -> list[Path]:
        """The files that `import name` could run, the one that it does run first."""
        places = (place for folder in self._folders for place in (folder / name / "__init__.py", folder / f"{name}.py"))
        return [place for place in places if place.is_file()]

    @functools.cached_property
    def torch(self) -> Torch | None:
        """The torch that is imported, if it says what it is."""
        place = next(iter(self.modules("torch")), None)
        if place is None:
            return None
        try:
            text = (place.parent / "version.py").read_text(encoding="utf-8")
        except OSError:
            return None
        pairs = re.findall(r"""^(\w+)(?:\s*:[^=]*)?\s*=\s*['"](.*)['"]""", text, flags=re.MULTILINE)
        said = dict(pairs)
        return Torch(place.parent, said.get("__version__", ""), *(said.get(name) for name in ("cuda", "hip", "xpu")))


def normal(name: str) -> str:
    """A package's name in its one spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fits(version: str, wanted: str) -> bool:
    """Whether a version is within "<3,>=2.1"; what cannot be read is."""
    return all(_holds(version, operator, bound) for operator, bound in _CLAUSE.findall(wanted))


def _holds(version: str, operator: str, bound: str) -> bool:
    have, want = _key(version), _key(bound.removesuffix(".*"))
    if have is None or want is None:
        return True
    if operator == "~=":
        return have >= want and _holds(version, "==", bound.rpartition(".")[0] + ".*")
    if bound.endswith(".*"):
        parts = tuple(map(int, re.findall(r"\d+", bound)))
        same = (have[0] + (0,) * len(parts))[: len(parts)] == parts
        return same if operator == "==" else not same
    return {
        "==": have == want, "===": have == want, "!=": have != want,
        "<": have < want, "<=": have <= want, ">": have > want, ">=": have >= want,
    }[operator]  # fmt: skip


def _key(version: str) -> tuple[tuple[int, ...], int, str] | None:
    """What orders versions: numbers, then early ones before the release and post-releases behind it."""
    match = re.match(r"v?(\d+(?:\.\d+)*)(.*)$", version.partition("+")[0])
    if match is None:
        return None
    numbers = [int(number) for number in match[1].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    rest = match[2].lstrip(".-_").lower()
    return tuple(numbers), 0 if not rest else 1 if rest.startswith(("post", "r")) and rest[:2] != "rc" else -1, rest
