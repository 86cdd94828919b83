"""What the scripts are called where they are used: files of a source tree, or words of the command `cm-diffusers`."""

import argparse
import difflib
import os
import re
from pathlib import Path

from cm_diffusers.scripts import CALLED_BY, CONSOLE, SCRIPTS, WORDS, settings_files


def command(script: str) -> str:
    """How a script is called here, for lines that say what comes next."""
    installed = SCRIPTS.name != "training"
    if installed or os.environ.get(CALLED_BY) == CONSOLE:
        return f"{CONSOLE} {WORDS[script]}"
    return f"python training/{script}.py"


def in_these_words(text: str) -> str:
    """A text, in which scripts are called as they are called here."""
    return re.sub(r"(?:python )?training/(\w+)\.py", lambda found: command(found[1]), text)


def parser_of(script: str, description: str) -> argparse.ArgumentParser:
    """A parser for a script's command line, with its text above `--help`."""
    return argparse.ArgumentParser(
        prog=command(script),
        description=in_these_words(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def recipe_file(name: str) -> Path:
    """The settings file that `--config` means: a path, or a recipe of the library by its name.

    Raises:
        ValueError: it is no path, and no recipe has the name.
    """
    if Path(name).is_file() or Path(name).name != name or Path(name).suffix:
        return Path(name)
    recipes = settings_files(SCRIPTS / "configs")
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name, recipes, n=3)
    hint = f" Near it are {', '.join(near)}." if near else ""
    raise ValueError(
        f"config {name!r} is no file and no recipe of the library.{hint} `{CONSOLE} recipes` lists the recipes."
    )
