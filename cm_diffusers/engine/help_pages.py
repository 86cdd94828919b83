"""What `--help` shows, kept as text in the folder `help` beside the scripts, as torch alone takes longer to import.

`make help-pages` writes the files; a test compares them with what the scripts say of themselves.
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
WIDTH = 100  # columns of the pages
CHOICE = """usage: {prog} [options]

{description}

{own}

what is trained:
  --config NAME         YAML file with the same keys as the flags, or a recipe's name; flags win.
  --method NAME         {choice}

{shared}
"""
SHARED = "training"  # the page of what all methods have; each has one of its own options as well


def training_page(prog: str, description: str, methods: Sequence[str], method: str, own: str, shared: str) -> str:
    """The help of a script that trains.

    Args:
        prog: what it is called.
        description: what it does.
        methods: that it trains; the first is the default.
        method: whose options are shown.
        own: the section of these options.
        shared: the sections of what all methods have.
    """
    return CHOICE.format(
        prog=prog,
        description=in_these_words(description).strip(),
        own=own.strip(),
        choice=_choice(prog, methods, method),
        shared=shared.strip(),
    )


def _choice(prog: str, methods: Sequence[str], method: str) -> str:
    """What the help says of --method, in its column."""
    if len(methods) == 1:
        return f"{method}, the only one."
    another = next(other for other in methods if other != method)
    return (
        f"{methods[0]} where none is named, or {', '.join(methods[1:])}.\n{'':24}`{prog} --method {another} --help`"
        " explains the options of another."
    )


def page_of(script: str, argv: Sequence[str], description: str | None = None) -> str | None:
    """The help that a script keeps; None where it keeps none.

    Args:
        script: its name.
        argv: its command line.
        description: that of a word which stands for this script and others, whose methods it has.
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
    """What a script says that it trains."""
    for node in _source(script).body if script in WORDS else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHODS":
            return ast.literal_eval(node.value)
    return []


def _chosen(argv: Sequence[str]) -> str | None:
    """The method that a command line names, or its recipe."""
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
    """Show the help and end, where this process runs a script of the library that is asked for it."""
    called = Path(sys.argv[0])
    if {"-h", "--help"} & set(sys.argv[1:]) and called.suffix == ".py" and called.resolve().parent == SCRIPTS:
        page = page_of(called.stem, sys.argv[1:])
        if page is not None:
            print(page, end="")
            raise SystemExit


def pages() -> dict[str, str]:
    """What the scripts and the methods say of themselves, by the names of their pages."""
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
