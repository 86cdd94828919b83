"""The page in a browser against the pipeline's numbers.

ONNXRUNTIME_WEB=<folder dist of the npm package> python -m pytest -m slow tests/deploy/test_page.py
"""

import functools
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.models import EDMUNet2DModel
from tests.deploy.test_export import export
from tests.helpers.browser import chromium
from tests.helpers.stock_pipelines import randomised


RUNTIME = os.environ.get("ONNXRUNTIME_WEB")
ASK = """
const [steps, label, noise, renoise, done] = arguments;
sample({ steps, label, noise: Float32Array.from(noise), renoise: Float32Array.from(renoise) })
  .then((pixels) => done(Array.from(pixels)), (error) => done(String(error)));
"""
PIXELS = """
const canvas = document.getElementById("image");
return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
"""


@pytest.fixture
def browser():
    with chromium() as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.skipif(RUNTIME is None, reason="ONNXRUNTIME_WEB names no folder dist of the npm package onnxruntime-web")
def test_the_page_makes_the_pipeline_s_images_of_the_same_noise(browser, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    network = randomised(EDMUNet2DModel(8, 3, 3, 8, (1,), 1, num_class_embeds=3))
    pipe = ConsistencyPipeline(network, MultistepConsistencyScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipeline")
    folder = tmp_path / "page"
    export(tmp_path / "pipeline", folder, "--num_inference_steps", 1, 3, "--page", "--runtime_dir", Path(RUNTIME))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: b.execute_script("return document.body.dataset.ready"))
        said = "return document.getElementById('said').textContent"
        assert browser.execute_script(said).startswith("1 step, ")  # without a click
        first = browser.execute_script(PIXELS)
        assert len(first) == 8 * 8 * 4 and np.std(first) > 10
        browser.find_element("id", "next").click()
        wait.until(lambda b: b.execute_script(PIXELS) != first)
        for steps in (1, 3):
            noise = torch.randn(1, 3, 8, 8)
            source = torch.Generator().manual_seed(4)
            renoise = torch.stack([torch.randn(1, 3, 8, 8, generator=source) for _ in range(2)])
            made = browser.execute_async_script(ASK, steps, 2, noise.flatten().tolist(), renoise.flatten().tolist())
            call = {"latents": noise, "generator": 4, "class_labels": 2, "num_inference_steps": steps}
            wanted = pipe(**call, output_type="pt").images
            assert np.abs(np.array(made) - wanted.flatten().numpy()).max() < 1e-5
        draws = np.array(browser.execute_script("return Array.from(normals(3, 100000))"))
        assert abs(draws.mean()) < 0.015 and abs(draws.std() - 1) < 0.01 and abs((draws**4).mean() - 3) < 0.1
        server.shutdown()
