"""The command `cm-diffusers`, with one subcommand ("word") for each task of the library.

    cm-diffusers train --config digits_ect --max_train_steps 60 --output_dir runs/mine
    cm-diffusers sample --pretrained_model_name_or_path runs/mine/pipeline --num_samples 16
    cm-diffusers train --num_processes 2 --method ect ...

`cm-diffusers WORD --help` explains a word. The scripts in the folder `training/` of the source tree do the same.
"""

import difflib
import importlib
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cm_diffusers.scripts import CALLED_BY, CONSOLE, LAUNCHED_BY, SCRIPTS, WORDS, settings_files


COMMANDS = {
    "train": "train a model for few-step sampling: ect, ct, ict, cd, ecd, sct, scd, mean_flow, ctm",
    "diffuse": "train a diffusion model, as a start or a teacher for other methods",
    "text": "distil a text-to-image model, into a LoRA or all weights",
    "recipes": "list the recipe names for --config",
    "sample": "make images with a saved model",
    "edit": "inpaint, outpaint, colorize, enlarge, denoise or change pictures",
    "evaluate": "measure a model, or the checkpoints of a run",
    "diagnose": "draw a model's denoised images at each noise level",
    "report": "make a web page about runs",
    "prepare": "convert images to the format that trains fastest",
    "convert": "convert checkpoints of other projects",
    "export": "write samplers for ONNX and torch.export, and a page that samples in the browser",
    "push": "publish a model, and its demo, on the Hub",
    "demo": "open a saved model in the browser",
    "toy": "train on a problem of one or two dimensions with a known solution",
}
BY_SEVERAL = ("train", "diffuse", "text", "evaluate")  # words that can run in several processes


def usage() -> str:
    """The help page that lists all words."""
    lines = [f"  {word:10s} {text}" for word, text in COMMANDS.items()]
    return f"usage: {CONSOLE} WORD ...\n\n" + "\n".join(lines) + f"\n\n`{CONSOLE} WORD --help` explains a word.\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a word of the command line. An unknown word ends the program with code 2."""
    word, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if word in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if word == "--version":
        print(importlib.import_module("cm_diffusers").__version__)
        return
    if word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"error: {word!r} is not a word of {CONSOLE}.{hint}\n\n{usage()}", file=sys.stderr, end="")
        raise SystemExit(2)
    os.environ[CALLED_BY] = CONSOLE
    if {"-h", "--help"} & set(rest) and (page := help_of(word, rest)) is not None:
        print(page, end="")
        raise SystemExit(0)
    if word in BY_SEVERAL:
        rest = launched(word, rest)
    try:
        run(word, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # for example by `cm-diffusers recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def run(word: str, argv: list[str]) -> None:
    """Run a word in this process with the arguments `argv`."""
    if word == "train":
        methods = [method for name in scripts_of(word) for method in script(name).METHODS]
        importlib.import_module("cm_diffusers.engine.training.run").main(argv, methods, TRAIN)
    elif word in ("diffuse", "text"):
        module = script(*scripts_of(word))
        importlib.import_module("cm_diffusers.engine.training.run").main(argv, module.METHODS, module.__doc__)
    elif word == "recipes":
        importlib.import_module("cm_diffusers.engine.recipes").main(argv)
    elif word == "demo":
        importlib.import_module("cm_diffusers.demo").main(argv)
    else:
        script(*scripts_of(word)).main(argv)


TRAIN = """Train a model that makes images in one to four steps.

    cm-diffusers train --config digits_ect
    cm-diffusers train --method ect --train_data_dir my_images --resolution 32 \\
        --model_preset base --max_train_steps 100000 --output_dir runs/mine

`cm-diffusers recipes` lists the recipe names for --config. --num_processes N trains on N GPUs of this machine, or with
N processes on its CPU. --accelerate_config NAME or FILE launches with Accelerate. The same command resumes a run that
was stopped.
"""


def help_of(word: str, argv: list[str]) -> str | None:
    """The stored help page of a word, because composing it takes seconds; None if no page is stored."""
    scripts, pages = scripts_of(word), importlib.import_module("cm_diffusers.engine.help_pages")
    return pages.page_of(scripts[0] if scripts else word, argv, TRAIN if word == "train" else None)


def scripts_of(word: str) -> list[str]:
    """Names of the scripts behind a word; `train` has one for each kind of method."""
    return [name for name, its_word in WORDS.items() if its_word == word]


def script(name: str):
    """The module of a script."""
    return importlib.import_module(f"cm_diffusers.scripts.{name}")


def launched(word: str, argv: list[str]) -> list[str]:
    """Remove the launch options from the command line; if there are any, run a launcher in this process instead.

    A launcher ends the program.
    """
    rest, launch = [], {}
    words = iter(argv)
    for text in words:
        name, has_value, value = text.partition("=")
        if name in ("--num_processes", "--accelerate_config"):
            launch[name] = value if has_value else next(words, "")
        else:
            rest.append(text)
    if not launch:
        return argv
    if len(launch) > 1:
        end("the file of --accelerate_config also sets num_processes; give one of the two flags.")
    count, file = launch.get("--num_processes"), launch.get("--accelerate_config")
    if count is not None:
        if not count.isdecimal() or int(count) < 1:
            end(f"num_processes must be an integer of at least 1; got {count!r}.")
        if int(count) == 1:
            return rest
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", count]
    else:
        launcher = ["accelerate.commands.launch", "--config_file", accelerate_file(file or "")]
    run_launcher(*launcher, "-m", "cm_diffusers.cli", word, *rest)


def run_launcher(launcher: str, *words: str) -> NoReturn:
    """Run a launcher's module in this process, and end with the exit code of the first failed process.

    The launcher's own errors are silenced, because the failed process reports its error.
    """
    os.environ[LAUNCHED_BY] = CONSOLE
    logging.disable(logging.ERROR)
    sys.argv = [launcher, *words]
    try:
        runpy.run_module(launcher, run_name="__main__", alter_sys=True)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        raise SystemExit(code) from None
    raise SystemExit(0)


def exit_code(error: Exception) -> int | None:
    """Exit code of the first failed process, from the launcher's `error`; None for other errors."""
    kind = type(error).__name__
    if kind == "ChildFailedError":
        _, failure = error.get_first_failure()  # type: ignore[attr-defined]
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if kind == "CalledProcessError":
        return error.returncode if error.returncode > 0 else 128 - error.returncode  # type: ignore[attr-defined]
    return 128 + error.sigval if kind == "SignalException" else None  # type: ignore[attr-defined]


def accelerate_file(name: str) -> str:
    """Path of an Accelerate settings file: `name` itself, or the library's file of that name; else end."""
    known = settings_files(SCRIPTS / "accelerate")
    if Path(name).is_file():
        return name
    if name in known:
        return str(known[name])
    end(f"accelerate_config {name!r} is neither a file nor one of {', '.join(known)}.")


def end(message: str) -> NoReturn:
    """Print an error and end the program with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
