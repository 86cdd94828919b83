"""A model's Space: its published files, and that it works without the library."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from cm_diffusers import CTMPipeline, CTMScheduler, TwoTimeModel
from cm_diffusers.engine.sharing import hub as engine_hub
from cm_diffusers.engine.sharing import space
from cm_diffusers.models import build_unet
from tests.helpers.loopback import TOKEN
from tests.helpers.scripts import load_script
from tests.test_layout import imports


ROOT = Path(__file__).parents[2]
PARTS = ("cm_diffusers/core", "cm_diffusers/models", "cm_diffusers/schedulers", "pipelines")
NAMES = ("__init__", "demo", "lookup", "parent", "pipelines", "pixels", "registration", "sampling")
MODULES = {f"cm_diffusers/{name}.py" for name in NAMES}
FILES = {"README.md", "app.py", "requirements.txt", *MODULES} | {
    path.relative_to(ROOT).as_posix() for part in PARTS for path in (ROOT / part).glob("*.py")
}


@pytest.fixture
def push(hub, api, monkeypatch):
    """A function that runs training/push.py with the given words and returns the exit code."""
    monkeypatch.setattr(engine_hub, "HfApi", lambda: api)
    script = load_script("push")

    def run(*words):
        with pytest.raises(SystemExit) as end:
            script.main([str(word) for word in words])
        return end.value.code

    return run


@pytest.fixture
def model_dir(tmp_path):
    network = build_unet("tiny", (8, 8), 1, 3)
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "run" / "pipeline")
    return tmp_path / "run" / "pipeline"


def front_matter(files):
    return yaml.safe_load(files["README.md"].decode().split("---")[1])


def test_what_a_space_holds_imports_nothing_of_the_library_that_it_does_not_hold():
    held = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in FILES}
    held |= {f"cm_diffusers.{name}" for name in held if name.startswith("pipelines")}
    for name in FILES - {"README.md", "app.py", "requirements.txt"}:
        wanted = {module for module in imports(ROOT / name) if module.startswith("cm_diffusers.")}
        assert wanted <= held, name


def test_a_space_is_the_demo_and_what_it_needs(hub, push, model_dir, capsys):
    assert push("--model_dir", model_dir, "--hub_model_id", "tester/model", "--space") == 0
    assert hub.repository("tester/model").messages == ["Upload model"]
    repo = hub.repository("tester/model", "space")
    assert repo.messages == ["Upload demo"] and not repo.private
    files = {name: content for name, content in repo.files.items() if name != ".gitattributes"}
    assert files.keys() == FILES
    for name in FILES - {"README.md", "app.py", "requirements.txt"}:
        assert files[name] == (ROOT / name).read_bytes()
    create = hub.calls("POST /api/repos/create")[-1].json()
    assert create["type"] == "space" and create["sdk"] == "gradio"
    said = capsys.readouterr().out
    assert f"Pushed its demo to {hub.url}/spaces/tester/model." in said and "HF_TOKEN" not in said
    assert str(model_dir.parent) not in b"".join(files.values()).decode()
    assert b"\n# model\n" in files["README.md"] and b'load_page("tester/model")' in files["app.py"]
    assert front_matter(files) == {
        "title": "model",
        "sdk": "gradio",
        "sdk_version": space.GRADIO,
        "python_version": "3.11",
        "app_file": "app.py",
        "models": ["tester/model"],
    }


def test_without_the_flag_there_is_no_space(hub, push, model_dir):
    assert push("--model_dir", model_dir, "--hub_model_id", "tester/model") == 0
    assert ("space", "tester/model") not in hub.repositories


def test_a_second_push_makes_no_commit_and_an_outage_none_twice(hub, push, model_dir, quick):
    words = ("--model_dir", model_dir, "--hub_model_id", "tester/model", "--space")
    hub.fail("POST .*/spaces/.*/commit/", times=1, reset=True, processed=True)
    hub.fail("POST .*/spaces/.*/preupload/", times=3, status=503)
    assert push(*words) == push(*words) == 0
    assert hub.repository("tester/model", "space").messages == ["Upload demo"]


def test_a_space_that_is_refused_is_said_and_the_model_stays(hub, push, model_dir, capsys):
    hub.fail("POST .*/spaces/.*/commit/", times=1, status=403)
    assert push("--model_dir", model_dir, "--hub_model_id", "tester/model", "--space") == 1
    assert "'Upload demo' was not pushed to tester/model" in capsys.readouterr().out
    assert hub.repository("tester/model").messages == ["Upload model"]


def test_a_private_models_space_is_private_and_needs_a_token(hub, push, model_dir, capsys):
    assert push("--model_dir", model_dir, "--hub_model_id", "tester/model", "--hub_private_repo", "--space") == 0
    assert hub.repository("tester/model").private and hub.repository("tester/model", "space").private
    assert "secret HF_TOKEN" in capsys.readouterr().out


def test_the_licence_is_that_of_the_models_card(tmp_path, model_dir):
    (model_dir / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    space.write_space(tmp_path, "tester/model", model_dir)
    assert front_matter({"README.md": (tmp_path / "README.md").read_bytes()})["license"] == "cc-by-nc-4.0"


def test_its_gradio_is_that_of_the_tests():  # test_requirements.py checks its other versions
    assert f"gradio=={space.GRADIO}\n" in (ROOT / "constraints.txt").read_text()


APP = """
import sys
sys.path.insert(0, sys.argv[1])
import app
import cm_diffusers

names = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("cm_diffusers")]
assert names and all(name.startswith(sys.argv[1]) for name in names), names
sample = next(f for f in app.demo.fns.values() if f.api_name == "sample").fn
grid, levels = sample(2, "", 0.0, 1, 0, 1)
kind, events = type(app.demo).__name__, sorted(f.api_name for f in app.demo.fns.values())
low, high = grid.convert("L").crop((0, 0, 480, 480)).getextrema()
print(kind, events, levels.count(",") + 1, "levels,", "a picture" if high - low > 50 else "nothing")
"""


@pytest.mark.wide
def test_the_app_makes_an_image_where_the_library_is_not(hub, api, tmp_path):
    network = TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), 1, 3))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    CTMPipeline(network, CTMScheduler(time_label="angle")).save_pretrained(tmp_path / "model")
    api.create_repo("tester/model", private=True)
    api.upload_folder(repo_id="tester/model", folder_path=tmp_path / "model")
    folder = tmp_path / "space"
    folder.mkdir()
    space.write_space(folder, "tester/model", tmp_path / "model")
    environment = hub.environment(tmp_path / "home", token=TOKEN, OMP_NUM_THREADS="1")
    command = [sys.executable, "-I", "-c", APP, str(folder)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "Blocks ['about', 'edit', 'invert', 'jump', 'sample'] 2 levels, a picture\n"
