"""Training runs that publish their results."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from huggingface_hub import ModelCard

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.sharing import hub as engine_hub
from cm_diffusers.engine.training.run import train
from tests.helpers.loopback import TOKEN, File, pushed
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import differences, flags, read_log, run


@pytest.fixture
def client(api, monkeypatch):
    """Let runs in this process push to the loopback Hub."""
    monkeypatch.setattr(engine_hub, "HfApi", lambda: api)


def push(words):
    """A function that runs training/push.py in this process."""
    script = load_script("push")
    with pytest.raises(SystemExit) as end:
        script.main(words)
    assert end.value.code == 0


def test_a_run_publishes_its_model_with_a_card_whose_snippet_runs(hub, client, tmp_path):
    with mock.patch("cm_diffusers.engine.saved.export.verify_export"):
        train(parse_config(flags(tmp_path / "digits", "ect", max_train_steps=2, push_to_hub=True), ["ect"], ""))
    files = pushed(hub, "tester/digits")
    grids = {f"samples/{name}.png" for name in ("1_step", "2_steps", "4_steps")}
    weights = "unet/diffusion_pytorch_model.safetensors"
    texts = {"README.md", "data.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert files.keys() == texts | {weights} | grids
    card = files["README.md"].decode()
    assert (
        str(tmp_path) not in card
        and "| steps | 2 of 8 images: 1 of diffusion pretraining, 1 of the method itself |" in card
    )
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
    assert len([commit for commit in repo.commits if commit.branch == "checkpoint"]) == 1  # only the newest state
    assert sorted(repo.tags) == ["step-2", "step-4"]
    assert list((tmp_path / ".hub").iterdir()) == []
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert len({repo.at(revision).files[weights] for revision in ("step-2", "step-4", "main")}) == 3


def test_a_hub_that_is_away_does_not_stop_training_and_the_command_it_prints_completes(
    hub,
    client,
    tmp_path,
    capsys,
    quick,
):
    hub.down()
    run(tmp_path / "digits", "ect", max_train_steps=2, push_to_hub=True, hub_model_id="tester/late", hub_timeout=3)
    hub.up()
    said = capsys.readouterr().out
    assert "WARNING: the Hub can't be reached now" in said and "Finish the push with:" in said
    command = said.split("Finish the push with:\n")[1].strip().split("\n")[0].split()
    assert command[:2] == ["python", "training/push.py"]
    push(command[2:])
    assert (
        pushed(hub, "tester/late")["model_index.json"] == (tmp_path / "digits/pipeline/model_index.json").read_bytes()
    )


@pytest.mark.parametrize("settings", [{"hub_model_id": "a/b/c"}, {"hub_model_id": "somebody/model"}])
def test_a_bad_place_is_found_before_training(hub, client, tmp_path, settings):
    with pytest.raises(ValueError, match="hub_model_id"):
        run(tmp_path, "ect", push_to_hub=True, **settings)
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "config.yaml").exists()


def test_a_place_without_a_push_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hub_model_id .* has no effect: only --push_to_hub"):
        run(tmp_path, "ect", hub_model_id="tester/model")


def test_a_finished_run_exports_again_where_a_variant_is_asked_for(tmp_path):
    folder = run(tmp_path, "ect", max_train_steps=1) / "pipeline" / "unet"
    assert not list(folder.glob("*.bf16.safetensors"))
    run(tmp_path, "ect", max_train_steps=1, export_variant="bf16")
    assert list(folder.glob("*.bf16.safetensors"))


def test_a_variant_is_published_beside_the_weights(hub, client, tmp_path):
    run(tmp_path / "half", "ect", max_train_steps=1, push_to_hub=True, export_variant="bf16")
    weights = {f"unet/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".bf16")}
    assert weights <= pushed(hub, "tester/half").keys()


# --- resuming from the Hub


KEPT = {}  # filled by the first test that needs it


@pytest.fixture
def lost(hub, client, tmp_path, tmp_path_factory):
    """The Hub has the state at step 4 of 6 of a run whose folder is lost; returns its uninterrupted twin's folder."""
    if not KEPT:
        KEPT["whole"] = run(tmp_path_factory.mktemp("runs") / "whole", "ct", s1=12, dropout=0.1)
        settings = {"push_to_hub": True, "hub_strategy": "every_save", "checkpointing_steps": 2}
        run(tmp_path / "lost", "ct", s1=12, dropout=0.1, **settings)
        KEPT["hub"] = copy.deepcopy((hub.repositories, hub.storage))
    hub.repositories, hub.storage = copy.deepcopy(KEPT["hub"])
    shutil.rmtree(tmp_path / "lost", ignore_errors=True)
    return Path(shutil.copytree(KEPT["whole"], tmp_path / "whole"))


def resume(folder, **settings):
    return run(folder, "ct", s1=12, dropout=0.1, resume_from_hub="tester/lost", **settings)


def test_a_run_goes_on_from_its_state_on_the_hub_bit_for_bit(hub, lost, tmp_path, capsys):
    again = resume(tmp_path / "again")
    assert "Fetched the checkpoint of step 4 from tester/lost" in capsys.readouterr().out
    assert differences(again, lost) == []
    assert read_log(again) == [row for row in read_log(lost) if row["step"] > 4]


def test_the_state_on_the_hub_names_no_folder_of_this_machine(hub, lost, tmp_path):
    files = hub.repository("tester/lost").at("checkpoint").files
    assert {"manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"} <= files.keys()
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_a_run_with_checkpoints_of_its_own_resumes_from_them(hub, lost, tmp_path, capsys):
    resume(lost, max_train_steps=7)
    assert "Resumed from step 6" in capsys.readouterr().out and not hub.calls("GET .*tester/lost/revision")


def tamper(hub):
    repo = hub.repository("tester/lost")
    tree = repo.at("checkpoint").tree
    content = bytearray(tree["model.safetensors"].content)
    content[-1] ^= 1
    repo.commit("checkpoint", "tampered", tree | {"model.safetensors": File(bytes(content))})


TROUBLES = {
    "tampered": (tamper, "model.safetensors was changed"),
    "no branch": (lambda hub: hub.repository("tester/lost").branches.pop("checkpoint"), "holds no checkpoint"),
    "no repository": (lambda hub: hub.repositories.clear(), "holds no checkpoint"),
    "out of reach": (lambda hub: hub.down(), "can't be fetched now"),
}


@pytest.mark.parametrize("trouble, message", TROUBLES.values(), ids=TROUBLES)
def test_a_state_that_is_not_to_be_had_is_an_error_and_leaves_nothing(hub, lost, tmp_path, trouble, message):
    trouble(hub)
    with pytest.raises(ValueError, match=f"resume_from_hub 'tester/lost'.*{message}"):
        resume(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*checkpoint*")) and not (tmp_path / "again/.tmp-hub").exists()


def test_a_state_of_another_run_is_refused(hub, lost, tmp_path):
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.01"):
        resume(tmp_path / "again", learning_rate=0.01)


# --- the card


def test_a_licence_that_the_hub_refuses_is_found_before_training(hub, client, tmp_path):
    teacher = run(tmp_path / "teacher", "diffusion", max_train_steps=1) / "pipeline"
    (teacher / "README.md").write_text("---\nlicense: mine\n---\n# Teacher\n")
    settings = {"pretrained_teacher_model": teacher, "num_scales": 12, "push_to_hub": True}
    with pytest.raises(ValueError, match='the Hub refuses the model card: (?s:.*)"license" must be one of'):
        run(tmp_path / "student", "cd", **settings)
    assert not (tmp_path / "student/log.jsonl").exists()


def test_a_non_commercial_teacher_is_warned_of_before_training(tmp_path, capsys):
    teacher = run(tmp_path / "teacher", "diffusion", max_train_steps=1) / "pipeline"
    (teacher / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Teacher\n")
    capsys.readouterr()
    run(tmp_path / "student", "cd", pretrained_teacher_model=teacher, num_scales=12, max_train_steps=1)
    out = capsys.readouterr().out
    assert out.index("WARNING: The teacher's licence (cc-by-nc-4.0)") < out.index("Saved")
    assert "does not allow commercial use" in (tmp_path / "student/pipeline/README.md").read_text()


def test_a_later_push_has_its_own_name_and_what_was_measured_since_on_the_card(hub, client, tmp_path, quick):
    folder = run(tmp_path / "digits", "ect", max_train_steps=1)
    assert "frechet" not in (folder / "pipeline/README.md").read_text()
    report = {"dataset": "digits", "extractor": {"name": "inception"}}
    report["results"] = [{"name": "1 step", "frechet_distance": 1.523}]
    (folder / "metrics.json").write_text(json.dumps(report))
    push(["--model_dir", str(folder / "pipeline"), "--hub_model_id", "lab/renamed"])
    card = ModelCard(pushed(hub, "lab/renamed")["README.md"].decode())
    assert 'from_pretrained("lab/renamed")' in card.text and "frechet distance, 1 step | 1.523" in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("frechet_distance", 1.523, "digits")


def test_the_token_is_in_no_file_and_no_output(hub, client, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("POST .*/commit/", times=1, status=403)
    run(tmp_path, "ect", max_train_steps=2, push_to_hub=True, hub_model_id="tester/secret", report_to="tensorboard")
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    out = capsys.readouterr()
    assert TOKEN not in out.out + out.err
    assert "Finish the push with:" in out.out
