"""Models with classes of the library, from the Hub: where only diffusers is, and where the library is."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from cm_diffusers import CTMPipeline, CTMScheduler, DenoisingPipeline, TwoTimeModel
from cm_diffusers.engine import clean_process
from cm_diffusers.engine.clean_process import two_images
from cm_diffusers.engine.export import save_pipeline
from cm_diffusers.models import build_unet


CLIENT = """
import importlib.util, json, sys
import numpy
from diffusers import DiffusionPipeline
how, path, *names = sys.argv[1:]
spec = importlib.util.spec_from_file_location("clean_process", path)
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
settings = {}
if how == "alone":
    sys.meta_path.insert(0, clean_process._Hidden())
    settings = {"custom_pipeline": "pipeline", "trust_remote_code": True}
else:
    import cm_diffusers
for name in names:
    classes = [DiffusionPipeline]
    if how != "alone":
        classes.append(getattr(cm_diffusers, name.split("-")[1]))
    for cls in classes:
        pipeline = cls.from_pretrained(name.split("-")[0], **settings)
        numpy.save(f"{how} {name.split('-')[1]} {cls.__name__}.npy", clean_process.two_images(pipeline))
assert (how == "alone") == ("cm_diffusers" not in sys.modules)
"""


@pytest.fixture
def models(hub, api, tmp_path):
    """Images by the pipeline's class name; each is on the Hub twice, once with code that must not run."""
    pipelines = [
        CTMPipeline(TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), 1, 3)), CTMScheduler(time_label="angle")),
        DenoisingPipeline(build_unet("tiny", (8, 8), 1, 3), EDMEulerScheduler()),
    ]
    images = {}
    for pipeline in pipelines:
        for parameter in pipeline.unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        name = type(pipeline).__name__
        images[name] = two_images(pipeline)
        save_pipeline(pipeline, tmp_path / name)
        for kind in ("sound", "poisoned"):
            if kind == "poisoned":
                for path in (tmp_path / name).rglob("*.py"):
                    path.write_text("raise SystemExit('poison')\n")
            api.create_repo(f"tester/{kind}{name}")
            api.upload_folder(repo_id=f"tester/{kind}{name}", folder_path=tmp_path / name)
    return images


@pytest.mark.parametrize("how, kind", [("alone", "sound"), ("library", "poisoned")])
def test_models_load_from_the_hub(hub, models, tmp_path, how, kind):
    environment = hub.environment(tmp_path / "home", OMP_NUM_THREADS="1")
    names = [f"tester/{kind}{name}-{name}" for name in models]
    command = [sys.executable, "-c", CLIENT, how, clean_process.__file__, *names]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    made = sorted(tmp_path.glob(f"{how} *.npy"))
    assert len(made) == len(models) * (1 if how == "alone" else 2)
    for path in made:
        assert np.array_equal(np.load(path), models[path.stem.split()[1]])
