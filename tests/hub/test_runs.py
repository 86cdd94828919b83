"""Training runs that publish what they make."""

import subprocess
import sys
from unittest import mock

import pytest
from loopback import TOKEN
from test_push import pushed, quick  # noqa: F401
from training_runs import flags, run

from cm_diffusers.engine import hub as engine_hub
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.run import train


@pytest.fixture
def client(api, monkeypatch):
    """Runs in this process push to the loopback Hub."""
    monkeypatch.setattr(engine_hub, "HfApi", lambda: api)


def test_a_run_publishes_its_model_with_a_card_whose_snippet_runs(hub, client, tmp_path):
    with mock.patch("cm_diffusers.engine.export.verify_export"):
        train(parse_config(flags(tmp_path / "digits", "ect", max_train_steps=2, push_to_hub=True), ["ect"], ""))
    files = pushed(hub, "tester/digits")
    grids = {f"samples/{name}.png" for name in ("1_step", "2_steps", "4_steps")}
    weights = "unet/diffusion_pytorch_model.safetensors"
    stock = {"README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", weights}
    assert files.keys() == stock | grids
    card = files["README.md"].decode()
    assert str(tmp_path) not in card and "| steps | 2 of 8 images |" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    check = "\nimport sys\nassert len(images) == 4 and 'cm_diffusers' not in sys.modules"
    environment = hub.environment(tmp_path / "home", token=TOKEN)
    subprocess.run([sys.executable, "-I", "-c", snippet + check], env=environment, check=True, cwd=tmp_path)


def test_every_save_is_published_with_a_tag_and_leaves_nothing_behind(hub, client, tmp_path):
    run(
        tmp_path,
        "ect",
        push_to_hub=True,
        hub_model_id="tester/often",
        hub_strategy="every_save",
        checkpointing_steps=2,
    )
    repo = hub.repository("tester/often")
    assert repo.messages == ["Step 2", "Step 4", "End of training"]
    assert sorted(repo.tags) == ["step-2", "step-4"]
    assert list((tmp_path / ".hub").iterdir()) == []
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert len({repo.at(revision).files[weights] for revision in ("step-2", "step-4", "main")}) == 3


def test_a_hub_that_is_away_does_not_stop_training_and_the_command_it_prints_completes(
    hub,
    client,
    tmp_path,
    capsys,
    quick,  # noqa: F811
):
    hub.down()
    run(tmp_path / "digits", "ect", max_train_steps=2, push_to_hub=True, hub_model_id="tester/late", hub_timeout=3)
    hub.up()
    said = capsys.readouterr().out
    assert "WARNING: the Hub can't be reached now" in said and "Finish the push with:" in said
    command = said.split("Finish the push with:\n")[1].strip().split("\n")[0].split()
    assert command[:2] == ["python", "training/push.py"]
    sys.path.insert(0, "training")
    import push

    with pytest.raises(SystemExit) as end:
        push.main(command[2:])
    assert end.value.code == 0
    assert (
        pushed(hub, "tester/late")["model_index.json"] == (tmp_path / "digits/pipeline/model_index.json").read_bytes()
    )


@pytest.mark.parametrize("settings", [{"hub_model_id": "a/b/c"}, {"hub_model_id": "somebody/model"}])
def test_a_bad_place_is_found_before_training(hub, client, tmp_path, settings):
    with pytest.raises(ValueError, match="hub_model_id"):
        run(tmp_path, "ect", push_to_hub=True, **settings)
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "config.yaml").exists()


def test_a_place_without_a_push_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hub_model_id is for --push_to_hub"):
        run(tmp_path, "ect", hub_model_id="tester/model")


def test_the_token_is_in_no_file_and_no_output(hub, client, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("POST .*/commit/", times=1, status=403)
    run(tmp_path, "ect", max_train_steps=2, push_to_hub=True, hub_model_id="tester/secret", report_to="tensorboard")
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    out = capsys.readouterr()
    assert TOKEN not in out.out + out.err
    assert "Finish the push with:" in out.out
