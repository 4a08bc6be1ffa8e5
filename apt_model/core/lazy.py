"""Names that resolve to another module on first use (PEP 562), so that importing a package loads nothing heavy."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for `package`.

    Args:
        package: the package's own `__name__`.
        homes: public name -> module that defines it; a name equal to the module's last part is the module itself.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 - PEP 562 names it
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(homes))}")
        module = importlib.import_module(home)
        value = module if home == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807 - PEP 562 names it
        return sorted({*homes, *vars(sys.modules[package])})

    return __getattr__, __dir__, sorted(homes)
