"""Names of the scripts as the user calls them: files of a source tree, or words of the command `cm-diffusers`."""

import argparse
import difflib
import os
import re
from pathlib import Path

from cm_diffusers.scripts import CALLED_BY, CONSOLE, SCRIPTS, WORDS, settings_files


def command(script: str) -> str:
    """The command line that starts a script here, for messages about the next step.

    Args:
        script: the name of the file in `training/`, without its suffix.
    """
    installed = SCRIPTS.name != "training"
    if installed or os.environ.get(CALLED_BY) == CONSOLE:
        return f"{CONSOLE} {WORDS[script]}"
    return f"python training/{script}.py"


def in_these_words(text: str) -> str:
    """Replace paths of scripts such as `training/sample.py` in `text` with the commands that start them here."""
    return re.sub(r"(?:python )?training/(\w+)\.py", lambda found: command(found[1]), text)


def parser_of(script: str, description: str) -> argparse.ArgumentParser:
    """A parser for the command line of `script`, with `description` at the top of its `--help`."""
    return _Parser(prog=command(script), description=in_these_words(description), formatter_class=HelpFormatter)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of descriptions, and show short names for values."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", None: "NAME", str: "NAME", Path: "PATH"}.get(action.type, "N")


class _Parser(argparse.ArgumentParser):
    """A parser whose usage line shows only the required arguments."""

    def format_usage(self) -> str:
        """The usage line, with required arguments only."""
        self.usage = self._needed()
        return super().format_usage()

    def format_help(self) -> str:
        """The text of `--help`."""
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
    """The settings file that `--config` names.

    Args:
        name: a path, or the name of a recipe of the library. An existing file wins over a recipe.

    Raises:
        ValueError: `name` looks like the name of a recipe, but there is no such recipe.
    """
    if Path(name).is_file() or Path(name).name != name or Path(name).suffix:
        return Path(name)
    recipes = settings_files(SCRIPTS / "configs")
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name, recipes, n=3)
    hint = f" Similar recipes: {', '.join(near)}." if near else ""
    raise ValueError(
        f"config {name!r} is neither a file nor a recipe of the library.{hint} `{CONSOLE} recipes` lists all recipes."
    )
