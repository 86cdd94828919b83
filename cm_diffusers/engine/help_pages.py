"""Pages of `--help`, stored as text in `training/help`, because importing torch alone takes longer than reading them.

`make help-pages` writes the files. A test compares them with the parsers of the scripts.
"""

import ast
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path

from cm_diffusers.engine.commands import command, in_these_words
from cm_diffusers.scripts import SCRIPTS, WORDS, settings_files


PAGES = SCRIPTS / "help"
WIDTH = 100  # of the pages, in characters
CHOICE = """usage: {prog} [options]

{description}

{own}

what is trained:
  --config NAME         YAML file with the same keys as the flags, or the name of a recipe. Flags win.
  --method NAME         {choice}

{shared}
"""
SHARED = "training"  # the page of the options that all methods share; each method has a page of its own options


def training_page(prog: str, description: str, methods: Sequence[str], method: str, own: str, shared: str) -> str:
    """Compose the help of a training script.

    Args:
        prog: the command that starts the script.
        description: the text at the top.
        methods: the methods that the script trains; the first is the default.
        method: the method whose options are shown.
        own: the section with the options of `method`.
        shared: the sections with the options that all methods share.
    """
    return CHOICE.format(
        prog=prog,
        description=in_these_words(description).strip(),
        own=own.strip(),
        choice=_choice(prog, methods, method),
        shared=shared.strip(),
    )


def _choice(prog: str, methods: Sequence[str], method: str) -> str:
    """The help text of --method, indented to its column."""
    if len(methods) == 1:
        return f"Method to train: {method}, the only one here."
    another = next(other for other in methods if other != method)
    return (
        f"Method to train: {methods[0]} (default), {', '.join(methods[1:])}.\n{'':24}"
        f"`{prog} --method {another} --help` shows the options of {another}."
    )


def page_of(script: str, argv: Sequence[str], description: str | None = None) -> str | None:
    """The stored help of a script, or None if no page is stored.

    Args:
        script: the name of the script.
        argv: its command line, which can name a method or a recipe.
        description: the text at the top for a word of `cm-diffusers` that combines several scripts.
    """
    try:
        scripts = [script] if description is None else [name for name in WORDS if WORDS[name] == WORDS[script]]
        methods = [method for name in scripts for method in methods_of(name)]
        if not methods:
            return in_these_words(_read(script))
        method, text = _chosen(argv) or methods[0], description or ast.get_docstring(_source(script)) or ""
        return training_page(command(script), text, methods, method, _read(method), _read(SHARED))
    except OSError:
        return None


def _read(name: str) -> str:
    return (PAGES / f"{name}.txt").read_text(encoding="utf-8")


def _source(script: str) -> ast.Module:
    return ast.parse((SCRIPTS / f"{script}.py").read_text(encoding="utf-8"))


def methods_of(script: str) -> list[str]:
    """The methods that a script trains, from its constant `METHODS`; empty for other scripts."""
    for node in _source(script).body if script in WORDS else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHODS":
            return ast.literal_eval(node.value)
    return []


def _chosen(argv: Sequence[str]) -> str | None:
    """The method that a command line names, itself or through its recipe; None for neither."""
    values = {}
    for name, value in zip(argv, [*argv[1:], ""]):
        flag, has_value, text = name.partition("=")
        if flag in ("--method", "--config"):
            values[flag] = text if has_value else value
    if "--method" in values or "--config" not in values:
        return values.get("--method")
    file = settings_files(SCRIPTS / "configs").get(values["--config"], Path(values["--config"]))
    found = re.search(r"^method: *(\w+)", file.read_text(encoding="utf-8"), re.M) if file.is_file() else None
    return found and found[1]


def answer() -> None:
    """Print the stored help and end the program, if this process runs a script of the library with --help."""
    called = Path(sys.argv[0])
    if {"-h", "--help"} & set(sys.argv[1:]) and called.suffix == ".py" and called.resolve().parent == SCRIPTS:
        page = page_of(called.stem, sys.argv[1:])
        if page is not None:
            print(page, end="")
            raise SystemExit


def pages() -> dict[str, str]:
    """The current help texts of all scripts and methods by the names of their pages, from their parsers."""
    from cm_diffusers.engine.config import parser_of_training
    from cm_diffusers.objectives import OBJECTIVES

    found = {}
    for method in OBJECTIVES:
        parser = parser_of_training(method, [method])
        found[method], found[SHARED] = (parser.format_sections(own) for own in (True, False))
    modules = {script: f"cm_diffusers.scripts.{script}" for script in WORDS if not methods_of(script)}
    for name, module in (modules | {"recipes": "cm_diffusers.engine.recipes", "demo": "cm_diffusers.demo"}).items():
        said = io.StringIO()
        with redirect_stdout(said), suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        found[name] = said.getvalue()
    return {name: text.strip() + "\n" for name, text in found.items()}


if __name__ == "__main__":
    os.environ["COLUMNS"] = str(WIDTH)
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / f"{name}.txt").write_text(text, encoding="utf-8")
answer()
