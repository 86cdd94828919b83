"""A text-to-image run is the same on two processes as on one."""

import pytest
import torch

from tests.helpers.tiny_text import PIPELINES
from tests.helpers.training_runs import read_log, tensors


SETTINGS = {
    "dataset_name": None, "class_conditional": None, "max_train_samples": None, "model_preset": None,
    "lora_rank": 2, "lora_target_modules": ["to_q", "to_v"], "teacher_guidance_scale": 3.0, "max_train_steps": 4,
    "checkpointing_steps": 2,
}  # fmt: skip


def test_a_lora_is_the_same_on_two_processes(server, tmp_path):
    PIPELINES["sd"]().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\na green triangle\n")
    settings = SETTINGS | {"pretrained_teacher_model": tmp_path / "teacher", "prompts": tmp_path / "prompts.txt"}
    one, two = tmp_path / "one", tmp_path / "two"
    server.run(one, "lcm", train_batch_size=4, **settings)
    assert "4 on 2 process(es)" in server.run(two, "lcm", processes=2, train_batch_size=2, **settings)
    losses = [[row["loss"] for row in read_log(folder)] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # products of other shapes round otherwise
    ours, theirs = tensors(two), tensors(one)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        if key[0] != "optimizer":
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)
