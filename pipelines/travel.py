"""The code that a saved pipeline contains, so that it loads with diffusers alone.

`pipeline.py` holds the pipeline's class. Beside each component of a library class is a file `cm_diffusers.py`. It
holds the classes of all such components, because diffusers copies these files to one place. The folder's index names
the library, not a file. Once cm_diffusers is imported, diffusers takes its classes and runs no code of the folder.
"""

import ast
import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict


LIBRARY = "cm_diffusers"
MAY_IMPORT = {"torch", "numpy", "diffusers", "PIL", *sys.stdlib_module_names}
DOCSTRING = """{title}, in one file that needs only torch, numpy and diffusers.

Written by save_pretrained of the library cm_diffusers {version} (Apache-2.0). The folder loads with

    DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)

or, once the library is imported, by DiffusionPipeline.from_pretrained(folder), which does not run this file.
"""
KEEP_APART = """
import hashlib
import sys
from pathlib import Path

# diffusers copies the files of all folders to one place and runs them under one name, each in the namespace of the
# last. This file takes a name, and so a namespace, of its own. It keeps its text, to be saved again.
TRAVELLING_SOURCE = Path(__file__).read_text(encoding="utf-8")
if __name__.startswith("diffusers_modules."):
    _this_module = sys.modules.pop(__name__)
    __name__ += "_" + hashlib.sha256(TRAVELLING_SOURCE.encode()).hexdigest()[:16]
    sys.modules[__name__] = _this_module
"""


def save_with_code(pipeline: DiffusionPipeline, folder: Any, *args: Any, **kwargs: Any) -> None:
    """Save `pipeline` in `folder` as diffusers does, together with the code of the library's classes.

    Further arguments are those of `DiffusionPipeline.save_pretrained`. No saved file names a folder of this machine.

    Raises:
        ValueError: a network carries an adapter, whose layout diffusers could not load.
    """
    for name, part in _components(pipeline).items():
        adapters = getattr(part, "peft_config", None)
        if adapters:
            raise ValueError(
                f"the {name} of this pipeline has adapters: {', '.join(adapters)}. Make them a part of the weights"
                " first (pipe.fuse_lora(), then pipe.unload_lora_weights()), or save them alone"
                " (pipe.save_lora_weights)."
            )
    for name, text in travelling_files(pipeline).items():  # first, because push_to_hub uploads the folder
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    with _portable_configs(pipeline):
        DiffusionPipeline.save_pretrained(pipeline, folder, *args, **kwargs)


def travelling_files(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Return the code to save with `pipeline`, by path in its folder; empty if all classes are from diffusers."""
    files, kind = {}, type(pipeline)
    if is_ours(kind):
        bases = [base.__name__ for base in kind.__mro__[1:] if is_ours(base)]
        files["pipeline.py"] = _source_kept(kind) or bundle(_sources([kind]), kind.__name__, _version(), hidden=bases)
    parts = _parts(pipeline)
    if parts:
        used = {cls for part in parts.values() for cls in _network_classes(part) if not _source_kept(cls)}
        classes = sorted(used, key=lambda cls: cls.__name__)
        title = ", ".join(cls.__name__ for cls in classes)
        for name, part in parts.items():
            source = _source_kept(type(part)) or bundle(_sources(classes), title, _version())
            files[f"{name}/{LIBRARY}.py"] = source
    return files


def is_ours(cls: type) -> bool:
    """Return whether `cls` is a class of the library, installed or loaded from a saved folder."""
    return cls.__module__.split(".")[0] == LIBRARY or _source_kept(cls) is not None


def bundle(sources: dict[str, str], title: str, version: str, hidden: Sequence[str] = ()) -> str:
    """Merge several modules into one self-contained module.

    Args:
        sources: the text of each module by its full name, after the library's modules that it imports from.
        title: the content of the result, for its docstring.
        version: the version of the library.
        hidden: names to delete at the end, because diffusers looks for exactly one pipeline in a module.

    Returns:
        The text of the merged module.

    Raises:
        ValueError: a name has two meanings, or a module imports more than `MAY_IMPORT` allows.
    """
    meanings: dict[str, str] = {}
    imports: set[str] = set()
    bodies: list[str] = []
    for module, source in {"the start": KEEP_APART, **sources}.items():
        tree = ast.parse(source)
        lines: list[str | None] = [*source.splitlines()]
        about = ast.get_docstring(tree)
        for position, node in enumerate(tree.body):
            is_import = isinstance(node, (ast.Import, ast.ImportFrom))
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found = _imports(node, module, sources)
            else:
                found = {name: f"{name} of {module}" for name in _defined(node)}
            for name, meaning in found.items():
                if meanings.setdefault(name, meaning) != meaning:
                    raise ValueError(
                        f"In one module {name!r} can't be both {meanings[name]!r} and {meaning!r}. Rename one."
                    )
            if is_import:
                imports |= set(found.values())
            if is_import or position == 0 and about:
                for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[number] = None
        heading = [f"# {line}".rstrip() for line in (f"--- {module}", *(about or "").splitlines())]
        body = "\n".join(line for line in lines if line is not None).strip("\n")
        bodies.append("\n".join(heading) + f"\n\n{body}\n" if module in sources else f"{body}\n")
    if hidden:
        bodies.append(f"del {', '.join(hidden)}  # diffusers looks for one pipeline in this file\n")
    docstring = DOCSTRING.format(title=title, version=version)
    return "\n\n".join([f'"""{docstring}"""\n\n# SPDX-License-Identifier: Apache-2.0\n\n{_merged(imports)}', *bodies])


def _imports(node: ast.Import | ast.ImportFrom, module: str, sources: dict[str, str]) -> dict[str, str]:
    """Split an import statement into one per name: {bound name: statement}. Empty for imports from `sources`."""
    followed = _followed(node, module)
    if followed in sources:
        there = {name for statement in ast.parse(sources[followed]).body for name in _defined(statement)}
        if all(alias.name in there and alias.asname is None for alias in node.names):
            return {}
    found = {}
    for alias in node.names:
        statement = copy.copy(node)
        statement.names = [alias]
        root = ((node.module or "") if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        if followed is not None or root not in MAY_IMPORT:
            raise ValueError(f"{module} can't be saved with a pipeline, because of: {ast.unparse(statement)}")
        found[alias.asname or alias.name.split(".")[0]] = ast.unparse(statement)
    return found


def _followed(node: ast.stmt, module: str) -> str | None:
    """Return the full name of the library module that a statement of `module` imports from; None for others."""
    if not isinstance(node, ast.ImportFrom):
        return None
    name = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
    return name if node.level or name.startswith(f"{LIBRARY}.") else None


def _merged(imports: set[str]) -> str:
    """Merge import statements of one name each to one statement per module."""
    names: dict[str, list[str]] = {}
    for statement in sorted(imports, key=lambda text: (text.startswith("from"), text)):
        start, _, name = statement.partition(" import ")
        names.setdefault(start, []).append(name)
    return "\n".join(f"{start} import {', '.join(some)}" if some[0] else start for start, some in names.items()) + "\n"


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _version() -> str:
    return sys.modules[LIBRARY].__version__


def _sources(classes: list[type]) -> dict[str, str]:
    """Return the texts of the modules that define `classes`, after the library modules that they import from."""

    def texts(module: ModuleType) -> dict[str, str]:
        source = inspect.getsource(module)
        found: dict[str, str] = {}
        for node in ast.parse(source).body:
            followed = _followed(node, module.__name__)
            if followed is not None:
                found |= texts(sys.modules[followed])
        return found | {module.__name__: source}

    found: dict[str, str] = {}
    for cls in classes:  # `cls.__module__` is the library as a whole, but its methods name their module
        found |= texts(sys.modules[cls.__init__.__module__])  # type: ignore[misc]  # on the class, not an instance
    return found


def _source_kept(cls: type) -> str | None:
    """Return the text of the saved file that defines `cls`; None for other classes."""
    return getattr(sys.modules.get(cls.__module__), "TRAVELLING_SOURCE", None)


def _components(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the components by name, without the wrappers of compiled ones."""
    return {name: getattr(part, "_orig_mod", part) for name, part in pipeline.components.items()}


def _parts(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the components whose classes are the library's, by name."""
    return {name: part for name, part in _components(pipeline).items() if is_ours(type(part))}


def _network_classes(part: Any) -> set[type]:
    """Return the class of `part` and, for a network, the library's classes of networks inside it."""
    modules = part.modules() if isinstance(part, ModelMixin) else ()
    return {type(part), *(type(m) for m in modules if isinstance(m, ModelMixin) and is_ours(type(m)))}


@contextmanager
def _portable_configs(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within the context, let configs name the library for its classes, and no folder that was loaded from."""
    components = {name: getattr(part, "_orig_mod", part) for name, part in pipeline.components.items()}
    kept = [
        (part, part._internal_dict) for part in (pipeline, *components.values()) if hasattr(part, "_internal_dict")
    ]
    try:
        for part, config in kept:
            part._internal_dict = FrozenDict({key: value for key, value in config.items() if key != "_name_or_path"})
        index = {name: (LIBRARY, type(part).__name__) for name, part in _parts(pipeline).items()}
        pipeline._internal_dict = FrozenDict({**pipeline._internal_dict, **index})
        yield
    finally:
        for part, config in kept:
            part._internal_dict = config
