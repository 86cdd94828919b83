"""Registration of our classes with diffusers: `save_pretrained` writes ["cm_diffusers", <class>].

`from_pretrained` finds pipelines by their names in the namespace of diffusers, and components in
`diffusers.pipelines.cm_diffusers`. Downloads from the Hub therefore also accept it as a known library.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


LIBRARY = "cm_diffusers"


def of_the_library(*classes: type) -> None:
    """Set the module of `classes` to the library, as saved models name it, instead of the file that defines them."""
    for cls in classes:
        cls.__module__ = LIBRARY


def when_diffusers_is_imported(library: ModuleType, pipelines: Sequence[str]) -> None:
    """Register `library` and its `pipelines` (by name) with diffusers: now, or as soon as diffusers is imported."""
    if "diffusers" in sys.modules:
        register(sys.modules["diffusers"], library, pipelines)
    else:
        sys.meta_path.insert(0, _Finder(library, pipelines))


def register(diffusers: ModuleType, library: ModuleType, pipelines: Sequence[str]) -> None:
    """Add `library`, and the names of `pipelines` that diffusers lacks, to the attributes of `diffusers`."""
    kind = type(diffusers)
    if not issubclass(kind, _FindsOurs):
        diffusers.__class__ = type(kind.__name__, (_FindsOurs, kind), {"_library": library, "_ours": tuple(pipelines)})
    setattr(diffusers.pipelines, LIBRARY, library)


class _FindsOurs:
    """Type of the module `diffusers`: it looks a name up among diffusers' lazy attributes first, then among ours."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name not in type(self)._ours:
                raise
        return getattr(type(self)._library, name)


class _Finder(MetaPathFinder):
    """Finds diffusers through the other finders and wraps the loader, which then registers our classes."""

    def __init__(self, library: ModuleType, pipelines: Sequence[str]):
        self.library, self.pipelines = library, pipelines

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "diffusers":
            others = (finder for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
            return spec
        return None


class _Loader(Loader):
    """Wraps another loader and registers our classes after it has run."""

    def __init__(self, loader: Any, finder: _Finder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        sys.meta_path.remove(self.finder)
        register(sys.modules[module.__name__], self.finder.library, self.finder.pipelines)
