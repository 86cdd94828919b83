"""A LoRA and a whole pipeline through the Hub: the code on their cards makes the images of the training process."""

import json
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard

from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.saved.lora import trained_weights
from cm_diffusers.engine.saved.text import free_encoders
from cm_diffusers.engine.sharing import hub as engine_hub
from cm_diffusers.engine.sharing.hub import Publisher, Push
from cm_diffusers.engine.text import clean_process as text_process
from cm_diffusers.engine.text.card import text_card
from cm_diffusers.engine.text.export import save_fused_model, save_lora_model
from tests.engine.test_text_card import finished
from tests.helpers.loopback import pushed
from tests.helpers.scripts import load_script
from tests.helpers.tiny_text import PIPELINES


# hides the library, runs the code on each card, and saves images of the pipeline that it makes
CLIENT = """
import runpy, sys
from pathlib import Path

process = Path(sys.argv[1])
sys.meta_path.insert(0, runpy.run_path(str(process.parents[1] / "saved" / "clean_process.py"))["_Hidden"]())
two_images = runpy.run_path(str(process))["two_images"]
import numpy
from huggingface_hub import hf_hub_download

for name in sys.argv[2:]:
    card = Path(hf_hub_download(f"tester/{name}", "README.md")).read_text()
    done = {}
    exec(card.split("```python\\n")[1].split("```")[0], done)
    assert done["image"].size == (8, 8)
    numpy.save(f"{name}.npy", two_images(done["pipe"]))
assert "cm_diffusers" not in sys.modules
"""


@pytest.mark.parametrize("fuse", [False, True])
def test_a_result_is_pushed_later_under_its_own_name_without_a_demo(hub, api, tmp_path, monkeypatch, capsys, fuse):
    monkeypatch.setattr(engine_hub, "HfApi", lambda: api)
    PIPELINES["sd"]().save_pretrained(tmp_path / "base")
    _, student, facts = finished(tmp_path / "base", fuse=fuse)
    model = tmp_path / "run" / RunFiles.MODEL
    save = save_fused_model if fuse else save_lora_model
    save(student, model, str(tmp_path / "base"), verify=False)
    (tmp_path / "run" / RunFiles.FACTS).write_text(json.dumps(facts))
    push = load_script("push").main
    with pytest.raises(SystemExit) as end:
        push(["--model_dir", str(model), "--hub_model_id", "tester/few", "--space"])
    assert "the demo shows no text-to-image models" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        push(["--model_dir", str(model), "--hub_model_id", "tester/few"])
    assert end.value.code == 0
    files = pushed(hub, "tester/few")
    assert ("pytorch_lora_weights.safetensors" in files) == (not fuse) and "scheduler/scheduler_config.json" in files
    local = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert local <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "text-to-image" and '"tester/few"' in card.text.split("```")[1]


def published(api, folder, name):
    """Push a folder as runs do."""
    api.create_repo(f"tester/{name}")
    publisher = Publisher(f"tester/{name}", api=api)
    publisher.push(Push(folder, "End of training"))
    assert publisher.finish(60)


def test_the_code_on_the_cards_makes_the_images_of_the_training(hub, api, tmp_path):
    pipe = PIPELINES["sd"]()
    pipe.save_pretrained(tmp_path / "base")
    published(api, tmp_path / "base", "base")
    expected = {}
    for name, settings in (("lora", {"method": "lcm", "lora_alpha": 16}), ("fused", {"method": "tcd", "fuse": True})):
        _, student, facts = finished(tmp_path / "base", **settings)
        for weight in trained_weights(student.unet).values():
            weight.data += 0.05
        free_encoders(student)
        expected[name] = text_process.two_images(student)
        facts |= {"base": "tester/base", "base_model": "tester/base"}
        card = text_card(json.loads(json.dumps(facts)), f"tester/{name}")
        save = save_fused_model if settings.get("fuse") else save_lora_model
        save(
            student,
            tmp_path / name,
            str(tmp_path / "base"),
            complete=lambda folder, card=card: card.save(folder / "README.md"),
            verify=False,
        )
        published(api, tmp_path / name, name)
    command = [sys.executable, "-c", CLIENT, text_process.__file__, *expected]
    environment = hub.environment(tmp_path / "home", OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, images in expected.items():
        assert np.abs(np.load(tmp_path / f"{name}.npy") - images).max() < 1e-4
    assert np.abs(expected["lora"] - expected["fused"]).max() > 1e-3
