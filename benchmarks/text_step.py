"""Cost of a LoRA step of text-to-image training (LCM) beyond its floor, and beside the step of diffusers' script.

    python benchmarks/text_step.py --diffusers_script <train_lcm_distill_lora_sd_wds.py of a checkout of diffusers>

- The floor: the teacher's forward pass with and without the prompt, the student's forward and backward pass, the
  target's forward pass and the optimiser step. Each part is timed separately in the same run.
- diffusers' script (commit 58eb52c) runs unchanged. It gets its batch from memory instead of a webdataset, and has no
  tracker. Packages that read webdatasets and images are replaced by empty modules. Its autocast is off, as it would
  take bfloat16 on a CPU.

Both train the same U-Net in float32, with the same batch, layers, rank, guidance scales, levels and optimiser. The
script encodes images and prompts in every step; ours reads them from its cache. Their encoding is timed as well:
`ratio_without_encoding` compares ours with the rest of their step. Our step keeps two averages of the adapter (target
and EMA) and checks that loss and gradient are finite. Theirs does neither.

The autoencoder has the proportion of Stable Diffusion 1.5: encoding an image takes 1.4 times as many multiplications
as a forward pass of the U-Net (558 and 402 billion at 512 x 512).
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from string import ascii_lowercase
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from common import paired, seconds, show
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.build import build_trainer as build
from cm_diffusers.engine.training.optimisers import build_optimizer
from cm_diffusers.engine.training.trainer import Trainer


BATCH, SIZE, WIDTH, CONTEXT, RANK = 4, 256, 64, 77, 8  # the script's context is 77
IMAGES = 16
STEPS = 10_000
SHARED = (  # flags that both trainings have
    f"--lora_rank {RANK} --lora_alpha {RANK} --resolution {SIZE} --num_ddim_timesteps 50 --learning_rate 1e-4"
    f" --max_train_steps {STEPS} --checkpointing_steps {STEPS + 1} --validation_steps {STEPS + 1}"
)
OURS = "--method lcm --w_min 6 --w_max 16 --optimizer adamw --caption_column text"
THEIRS = "--w_min 5 --w_max 15 --loss_type huber --max_train_samples 100000"  # their scale is our w - 1
SCHEDULER = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
READERS = ["webdataset", "webdataset.tariterators", "braceexpand"]
READERS += ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]


def build_pipeline() -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights, for images of `SIZE` and prompts of `CONTEXT` tokens."""
    torch.manual_seed(0)
    tokens = ["<|startoftext|>", "<|endoftext|>", *ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CONTEXT)
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )  # fmt: skip
    unet = UNet2DConditionModel(
        SIZE // 8, layers_per_block=1, block_out_channels=(64, 128), attention_head_dim=4, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(20, 40, 80, 80), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )  # fmt: skip


def build_trainer(folder: str, accelerator: Accelerator, batch: int = BATCH) -> Trainer:
    """A trainer for images of noise with captions. The teacher is saved in `folder`/teacher."""
    build_pipeline().save_pretrained(f"{folder}/teacher")
    images = Path(folder, "images")
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    rows = [{"file_name": f"{i}.png", "text": caption(i)} for i in range(IMAGES)]
    for row, image in zip(rows, pixels):
        Image.fromarray(image).save(images / row["file_name"])
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = f"{SHARED} {OURS} --pretrained_teacher_model {folder}/teacher --train_data_dir {images}"
    flags += f" --train_batch_size {batch} --output_dir {folder}/run"
    return build(parse_config(flags.split(), ["lcm"], ""), accelerator)


def caption(i: int) -> str:
    """The `i`-th prompt: that many letters and one."""
    return " ".join(ascii_lowercase[: 1 + i])


def floor_parts(trainer: Trainer) -> dict[str, Callable[[], object]]:
    """The unavoidable parts of a step."""
    objective = trainer.objective
    network, teacher, device = objective.network, objective.teacher.network, trainer.accelerator.device
    sample, text = torch.randn(BATCH, 4, SIZE // 8, SIZE // 8), torch.randn(BATCH, CONTEXT, WIDTH)
    inputs = [part.to(device) for part in (sample, torch.full((BATCH,), 500), text)]
    twice = [torch.cat([part, part]) for part in inputs]
    optimizer = build_optimizer(network, trainer.run)
    optimizer.param_groups[0]["lr"] = 0.0

    def student() -> None:
        optimizer.zero_grad()
        network(*inputs).sample.square().mean().backward()

    return {
        "teacher": torch.no_grad()(lambda: teacher(*twice)),
        "student": student,
        "target": torch.no_grad()(lambda: objective.target(*inputs)),
        "optimizer": optimizer.step,
    }


# --- diffusers' script -----------------------------------------------------------------------------------------


class Pairs:
    """A stand-in for the script's dataset: the same images and captions again and again."""

    num_batches = STEPS

    def __init__(self, **settings: Any):
        torch.manual_seed(1)
        self.images = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1
        self.captions = [caption(i) for i in range(BATCH)]

    @property
    def train_dataloader(self) -> "Pairs":
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        return iter([(self.images, self.captions)] * STEPS)


class Script:
    """The script's `main` in a separate thread, which waits after each step for the next call of `step`.

    Args:
        file: the script.
        folder: holds the teacher; the script writes into it.
    """

    def __init__(self, file: Path, folder: str):
        self.module = import_script(file)
        flags = f"{SHARED} {THEIRS} --pretrained_teacher_model {folder}/teacher --output_dir {folder}/theirs"
        with mock.patch.object(sys, "argv", ["script", *flags.split(), "--train_batch_size", str(BATCH)]):
            args = self.module.parse_args()
        args.report_to = None  # no tracker
        self.module.SDText2ImageDataset = Pairs
        self.module.tqdm = lambda *_, **__: SimpleNamespace(update=lambda n: None, set_postfix=self._wait)
        self.pipeline, self.pairs = StableDiffusionPipeline.from_pretrained(f"{folder}/teacher"), Pairs()
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        with mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()):  # on a CPU it would take bfloat16
            threading.Thread(target=self._run, args=(args,), daemon=True).start()
            self._join()

    def _run(self, args: Any) -> None:
        try:
            self.module.main(args)
        except BaseException as error:
            self.error = error
        self.done.release()

    def _wait(self, **logs: object) -> None:
        self.done.release()
        self.go.acquire()

    def _join(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise RuntimeError(f"the script failed: {self.error}") from self.error

    def step(self) -> None:
        self.go.release()
        self._join()

    def encode(self) -> None:
        """What the script encodes in each step."""
        pipeline = self.pipeline
        self.module.encode_prompt(self.pairs.captions, pipeline.text_encoder, pipeline.tokenizer, 0)
        with torch.no_grad():
            pipeline.vae.encode(self.pairs.images).latent_dist.sample()


def import_script(file: Path) -> ModuleType:
    """Import the script, with empty modules in place of `READERS`."""
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in READERS}):
        spec.loader.exec_module(module)
    return module


# --- the comparison --------------------------------------------------------------------------------------------


def main(file: Path | None, rounds: int) -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, Accelerator())
        batches, stopping = trainer.data.batches(trainer.share, 0), Stopping()

        def ours() -> None:
            trainer.take_step(batches, stopping)

        rows["over_floor"] = paired(ours, floor_parts(trainer), rounds)
        if file is not None:
            script = Script(file, folder)
            report = paired(ours, {"theirs": script.step}, rounds)
            encoding = 1000 * statistics.median(seconds(script.encode) for _ in range(rounds))
            report["encoding_ms"] = round(encoding, 2)
            report["ratio_without_encoding"] = round(report["ratio"] / (1 - encoding / report["theirs_ms"]), 3)
            rows["over_diffusers"] = report
        show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers_script", type=Path, help="the script to compare with; default: none")
    parser.add_argument("--rounds", type=int, default=10, help="number of paired timings (default: 10)")
    args = parser.parse_args()
    main(args.diffusers_script, args.rounds)
