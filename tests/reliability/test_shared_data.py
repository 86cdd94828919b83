"""Two processes that share the pass over the images and the encoding of latents, and what they have in the end."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cm_diffusers.engine.processes import WAIT, Team
from tests.helpers.fork_server import free_port, launcher_environment
from tests.helpers.scripts import ROOT


BATCH = 4  # of the autoencoder
CASES = ("images", "images again", "broken", "few")  # the second time, the findings and the latents are in files
READS = """
import json, sys
from pathlib import Path
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data import latents, scan
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.processes import Team, start_accelerator

data, out, batch, cases = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
team = Team(accelerator := start_accelerator())
read, encoded, decode, encode = [], [], scan.DecodedImages.__getitem__, latents.encode
scan.DecodedImages.__getitem__ = lambda self, i: read.append(i) or decode(self, i)
latents.encode = lambda vae, images: encoded.append(len(images)) or encode(vae, images)


def work(case):
    read.clear(), encoded.clear()
    folder = case.split()[0]
    (out / folder).mkdir(parents=True, exist_ok=True), (out / case).mkdir(exist_ok=True)
    kept = out / folder
    try:
        images = ImageData(DataArguments(train_data_dir=str(data / folder)), False, kept / "scanned", False, team=team)
    except ValueError as error:
        return {"error": str(error)}
    torch.manual_seed(0)
    channels = images.channels
    vae = AutoencoderKL(channels, channels, block_out_channels=(8,), latent_channels=2, norm_num_groups=4)
    latent = latents.LatentData(images, vae, kept / "latents", "cpu", print, batch, team)
    save_file({"images": images.images, "latents": latent.images}, out / case / f"{team.rank}.safetensors")
    described = [part.description.to_dict() for part in (images, latent)]
    return {"read": list(read), "encoded": list(encoded), "described": described}


found = {case: work(case) for case in cases}
if team.world > 1:
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    model = accelerator.prepare_model(torch.nn.Linear(1, 1))
    found |= {"seconds": group.options._timeout.total_seconds(), "buffers": model.broadcast_buffers}
    found |= {"views": model.gradient_as_bucket_view}
(out / f"{team.rank}.json").write_text(json.dumps(found))
accelerator.end_training()
"""


def read_by(processes, data, out):
    """Read the images of all `CASES` and encode them; returns what each process did."""
    port, running = free_port(), []
    for rank in range(processes):
        environment = {**launcher_environment(processes, rank, port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"ACCELERATE_USE_CPU": "true", "HF_HOME": str(out.parent / "home")}
        command = [sys.executable, "-c", READS, str(data), str(out), str(BATCH), *CASES]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, text = process.communicate(timeout=300)
        assert process.returncode == 0, text[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


def write_images(folder, number):
    """Images of 16 bits, of which the first are grey and dark, and the second half has one in colour."""
    folder.mkdir(parents=True)
    for i in range(number):
        top = 200 if i < 2 else 60_000  # read alone, the first images would be bright
        values = np.random.default_rng(i).integers(0, top, (8, 8)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{i:02d}.png")
    Image.fromarray(np.random.default_rng(99).integers(0, 256, (8, 8, 3), np.uint8)).save(
        folder / f"{number - 2:02d}.png"
    )


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The folders of one process and of two, and what each process did."""
    folder = tmp_path_factory.mktemp("shared")
    for name, number in (("images", 11), ("broken", 5), ("few", 2)):
        write_images(folder / "data" / name, number)
    (folder / "data" / "broken" / "04.png").write_bytes(b"nothing")
    (folder / "data" / "few" / "01.png").unlink()
    one, two = folder / "one", folder / "two"
    return one, two, read_by(1, folder / "data", one)[0], read_by(2, folder / "data", two)


def assert_equal(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_read_and_encode_their_own_images(read):
    _, _, one, two = read
    assert one["images"]["read"] == list(range(11)) and one["images"]["encoded"] == [4, 4, 3]
    assert [process["images"]["read"] for process in two] == [list(range(5)), list(range(5, 11))]
    assert [process["images"]["encoded"] for process in two] == [[4], [4, 3]]


@pytest.mark.parametrize("case", ["images", "images again", "few"])
def test_two_processes_have_the_images_and_latents_of_one(read, case):
    one, two, by_one, by_two = read
    for rank, process in enumerate(by_two):
        assert process[case]["described"] == by_one[case]["described"]
        assert_equal(two / case / f"{rank}.safetensors", one / case / "0.safetensors")
    for name in ("scanned", "latents"):
        assert_equal(two / case.split()[0] / name, one / case.split()[0] / name)


def test_the_images_of_the_test_are_decoded_by_the_range_and_in_the_colours_of_all(read):
    images = load_file(read[0] / "images" / "0.safetensors")["images"]
    assert images.shape == (11, 3, 8, 8) and images[0].max() <= 1 and images[3].max() > 100


def test_nothing_is_read_again_that_is_kept(read):
    assert all(process["images again"]["read"] == process["images again"]["encoded"] == [] for process in read[3])


def test_more_processes_than_images_wait_for_nothing(read):
    assert [process["few"]["read"] for process in read[3]] == [[], [0]]


def test_a_broken_image_is_named_by_both_processes(read):
    first, second = (process["broken"]["error"] for process in read[3])
    assert first == second and "1 of 5 images can't be read" in first and "04.png" in first


def test_processes_wait_for_days_and_gradients_are_not_copied(read):
    for process in read[3]:
        assert (process["seconds"], process["views"], process["buffers"]) == (WAIT.total_seconds(), True, False)


@pytest.mark.parametrize("count, multiple, world", [(0, 1, 3), (1, 1, 3), (10, 1, 3), (1000, 64, 8), (100, 64, 8)])
def test_parts_are_all_rows_in_order_and_begin_with_a_batch(count, multiple, world):
    parts = []
    for rank in range(world):
        team = Team()
        team.rank, team.world = rank, world
        parts.append(team.part(count, multiple))
    assert [row for part in parts for row in part] == list(range(count))
    assert all(part.start % multiple == 0 for part in parts if part)
    assert max(map(len, parts)) - min(map(len, parts)) <= multiple
