"""The command `cm-diffusers`: it runs the scripts, and the commands that it proposes work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cm_diffusers import cli
from cm_diffusers.engine import commands, help_pages, recipes
from cm_diffusers.engine.commands import CONSOLE, WORDS, command, in_these_words, recipe_file
from tests.helpers.breadth import narrowed
from tests.helpers.training_runs import flags


ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in (ROOT / "training").glob("*.py")}


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setenv(commands.CALLED_BY, CONSOLE)


def test_every_script_has_a_word_and_every_word_a_script():
    assert WORDS.keys() == SCRIPTS - {"quickstart"}
    assert set(WORDS.values()) | {"recipes", "demo"} == cli.COMMANDS.keys()
    assert (cli.CONSOLE, cli.CALLED_BY) == (commands.CONSOLE, commands.CALLED_BY)  # copies, which import fast
    assert all(word in (ROOT / "README.md").read_text() for word in ("cm-diffusers train", "cm-diffusers recipes"))


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_every_word_explains_itself_as_it_is_called(word, capsys, console):
    with pytest.raises(SystemExit) as end:
        cli.main([word, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and len(said) > 200
    assert "python training/" not in said
    if word != "demo":
        assert f"cm-diffusers {word}" in said


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse sets its lines otherwise")
def test_the_pages_of_the_help_are_what_the_scripts_say(monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("COLUMNS", str(help_pages.WIDTH))
    monkeypatch.delenv(commands.CALLED_BY, raising=False)
    kept = {path.stem: path.read_text(encoding="utf-8") for path in help_pages.PAGES.glob("*.txt")}
    assert kept == help_pages.pages(), "make help-pages"


IMPORTED = "import sys; print(*sorted(name for name in sys.modules if name in ('torch', 'diffusers', 'transformers')))"


@pytest.mark.parametrize("words", [["train", "--method", "scd"], ["diffuse"], ["sample"], ["demo"], ["recipes"]])
def test_help_of_the_command_imports_nothing_that_is_slow(words):
    code = f"from cm_diffusers.cli import main\ntry: main({[*words, '--help']})\nexcept SystemExit: pass\n{IMPORTED}"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.splitlines()[-1] == "" and "usage: cm-diffusers" in said


@pytest.mark.parametrize("script", sorted(SCRIPTS - {"quickstart"}))
def test_help_of_a_script_imports_nothing_that_is_slow(script):
    command = [sys.executable, "-X", "importtime", f"training/{script}.py", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.startswith(f"usage: python training/{script}.py")
    assert "torch" not in said.stderr and "diffusers.utils" not in said.stderr


def test_help_shows_the_options_of_the_method_first_and_of_the_recipe_s_method(capsys, console):
    for words in (["--method", "mean_flow"], ["--config=mnist_mean_flow_small"]):
        with pytest.raises(SystemExit):
            cli.main(["train", *words, "--help"])
        said = capsys.readouterr().out
        places = [said.index(words) for words in ("options of mean_flow:", "what is trained:", "usual options:")]
        assert places == sorted(places) and "--equal_times" in said[places[0] : places[1]]


def test_the_words_are_listed_and_a_wrong_one_is_told_the_right_one(capsys):
    cli.main([])
    listed = capsys.readouterr().out
    assert all(f"  {word} " in listed for word in cli.COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sampel"])
    assert "'sampel' is not a word of cm-diffusers. Did you mean sample?" in capsys.readouterr().err
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __import__("cm_diffusers").__version__


def test_a_script_is_called_as_its_user_calls_it(monkeypatch):
    monkeypatch.delenv(commands.CALLED_BY, raising=False)
    text = "Do this: python training/train_consistency.py --x 1, as training/push.py does."
    assert command("sample") == "python training/sample.py"
    assert in_these_words(text) == text.replace("as training", "as python training")
    monkeypatch.setenv(commands.CALLED_BY, CONSOLE)
    assert command("prepare_data") == "cm-diffusers prepare"
    assert in_these_words(text) == "Do this: cm-diffusers train --x 1, as cm-diffusers push does."
    monkeypatch.delenv(commands.CALLED_BY)
    monkeypatch.setattr(commands, "SCRIPTS", Path("site-packages/cm_diffusers/scripts"))  # a missing folder
    assert command("sample") == "cm-diffusers sample"


def test_recipes_are_found_by_name_and_paths_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_file("digits_ect").read_text() == (ROOT / "training/configs/digits_ect.yaml").read_text()
    (tmp_path / "digits_ect").write_text("method: ect\n")
    assert recipe_file("digits_ect") == Path("digits_ect")  # a file with that name has priority
    assert recipe_file("nowhere/mine.yaml") == Path("nowhere/mine.yaml")
    with pytest.raises(
        ValueError, match="'mnist_etc' is neither a file nor a recipe of the library. Similar recipes: mnist_ect"
    ):
        recipe_file("mnist_etc")


def test_recipes_are_listed_with_what_they_come_to(capsys):
    recipes.main([])
    listed = capsys.readouterr().out
    for path in (ROOT / "training" / "configs").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert f"\n{path.stem}: {settings['method']} on {settings['dataset_name']}, " in "\n" + listed
    assert (
        "digits_ect: ect on digits, 5,000 steps of 64, a few minutes on a CPU, network tiny, 0.191 M at 8 x 8"
        in listed
    )
    recipes.main(["digits_ect"])
    assert capsys.readouterr().out == (ROOT / "training/configs/digits_ect.yaml").read_text()
    with pytest.raises(SystemExit, match="2"):
        recipes.main(["digits"])
    assert "'digits' is not a recipe. The recipes are: afhqv2_cdm" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_fault():
    command = f"{sys.executable} -m cm_diffusers.cli recipes | true"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


@pytest.fixture
def started(monkeypatch):
    """The command lines of launchers that would run in this process."""
    found = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda name, **how: found.extend(sys.argv))
    monkeypatch.setattr(cli.logging, "disable", lambda level: None)
    monkeypatch.setattr(sys, "argv", ["cm-diffusers"])
    monkeypatch.setenv(cli.LAUNCHED_BY, "")
    return found


def test_several_processes_are_launched_by_their_number_or_by_a_file(started):
    with pytest.raises(SystemExit):
        cli.launched("train", ["--method", "ect", "--num_processes", "4", "--seed=1"])
    module, *rest = started
    assert module == "torch.distributed.run" and os.environ[cli.LAUNCHED_BY] == CONSOLE
    assert rest[:5] == ["--standalone", "--nproc_per_node", "4", "-m", "cm_diffusers.cli"]
    assert rest[5:] == ["train", "--method", "ect", "--seed=1"]
    started.clear()
    with pytest.raises(SystemExit):
        cli.launched("diffuse", ["--accelerate_config=several_gpus", "--method", "cdm"])
    assert started[:2] == ["accelerate.commands.launch", "--config_file"]
    assert started[2] == str(ROOT / "training" / "accelerate" / "several_gpus.yaml")
    assert started[3:] == ["-m", "cm_diffusers.cli", "diffuse", "--method", "cdm"]


def test_one_process_is_not_launched(started):
    assert cli.launched("train", ["--num_processes", "1", "--method", "ect"]) == ["--method", "ect"]
    assert cli.launched("train", ["--method", "ect"]) == ["--method", "ect"] and not started


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num_processes", "0"], "num_processes must be an integer of at least 1; got '0'"),
        (["--num_processes"], "num_processes must be an integer of at least 1; got ''"),
        (["--accelerate_config", "four"], "accelerate_config 'four' is neither a file nor one of cpu, one_gpu"),
        (["--num_processes", "2", "--accelerate_config", "cpu"], "give one of the two flags"),
    ],
)
def test_launches_that_can_not_be_are_said(words, message, capsys, started):
    with pytest.raises(SystemExit, match="2"):
        cli.launched("train", words)
    assert message in capsys.readouterr().err and not started


class Failure:
    def __init__(self, exitcode):
        self.exitcode = exitcode


class ChildFailedError(Exception):
    def get_first_failure(self):
        return 0, Failure(*self.args)


@pytest.mark.parametrize(
    "error, code",
    [
        (ChildFailedError(2), 2),
        (ChildFailedError(-9), 137),
        (subprocess.CalledProcessError(3, "train"), 3),
        (subprocess.CalledProcessError(-15, "train"), 143),
    ],
)
def test_a_launcher_ends_as_the_first_process_that_failed(started, monkeypatch, error, code):
    def fail(name, **how):
        raise error

    monkeypatch.setattr(cli.runpy, "run_module", fail)
    with pytest.raises(SystemExit) as end:
        cli.launched("train", ["--num_processes", "2"])
    assert end.value.code == code


def test_a_fault_of_a_launcher_itself_is_not_hidden(started, monkeypatch):
    monkeypatch.setattr(cli.runpy, "run_module", lambda name, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.launched("train", ["--num_processes", "2"])


LAUNCHERS = {
    "the command": ["cm_diffusers.cli", "train", "--num_processes", "2"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cm_diffusers.train"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "-m", "cm_diffusers.train"],
}


@pytest.mark.parametrize("name", narrowed(LAUNCHERS, "torchrun"))
def test_the_user_s_own_error_is_the_last_thing_on_the_screen_and_stands_there_once(tmp_path, name):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *LAUNCHERS[name], "--dataset_name", "digits", "--q", "none"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = result.stderr.strip().splitlines()
    assert result.returncode != 0 and lines[-1] == "error: --q: invalid float value: 'none'"
    assert sum("error: --q" in line for line in lines) == 1
    if name == "the command":
        assert result.returncode == 2 and not [line for line in lines if "distributed" in line]


@pytest.mark.wide
def test_two_processes_train_by_the_command(tmp_path):
    words = flags(tmp_path / "run", max_train_steps=2)
    command = [sys.executable, "-m", "cm_diffusers.cli", "train", "--num_processes", "2", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on 2 process(es)" in result.stdout and "Sample it:  cm-diffusers sample --pretrained" in result.stdout


@pytest.mark.wide
def test_launchers_start_the_module_of_training(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "cm_diffusers.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = map(str, flags(tmp_path / "run", max_train_steps=1))
    result = subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
