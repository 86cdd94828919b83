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
    return _Parser(prog=command(script), description=in_these_words(description), formatter_class=HelpFormatter)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and short names of values."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", None: "NAME", str: "NAME", Path: "PATH"}.get(action.type, "N")


class _Parser(argparse.ArgumentParser):
    """A parser whose usage names what is needed, and not every option."""

    def format_usage(self) -> str:
        self.usage = self._needed()
        return super().format_usage()

    def format_help(self) -> str:
        self.usage = self._needed()
        return super().format_help()

    def _needed(self) -> str:
        formatter, words = self._get_formatter(), []
        for action in self._actions:
            if action.required or not action.option_strings:
                value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
                words.append(" ".join([*action.option_strings[:1], value]))
        return " ".join([self.prog, *words, "[options]"])


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
