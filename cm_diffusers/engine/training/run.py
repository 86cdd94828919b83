"""Train a model from its settings and save its pipeline: the entry point of the training scripts."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import ProjectConfiguration
from diffusers.utils.logging import disable_progress_bar
from tqdm.auto import tqdm

from cm_diffusers.engine.checkpoint import copy_checkpoint, go_back_to
from cm_diffusers.engine.commands import command, in_these_words
from cm_diffusers.engine.config import Config, parse_config
from cm_diffusers.engine.files import RunFiles, holds, remove, replace_file
from cm_diffusers.engine.lock import lock_folder
from cm_diffusers.engine.processes import ends_with_a_line, start_accelerator, together
from cm_diffusers.engine.sharing.card import portable_settings
from cm_diffusers.engine.sharing.hub import CHECKPOINT_BRANCH, CHECKPOINT_FILES, Publisher, Push, fetch_checkpoint
from cm_diffusers.engine.stopping import Stopped, Stopping, unbroken_output
from cm_diffusers.engine.training.budget import within_budget
from cm_diffusers.engine.training.build import build_trainer
from cm_diffusers.engine.training.precision import arithmetic, check_device, choose_precision
from cm_diffusers.engine.training.run_folder import check_ours, look_over
from cm_diffusers.engine.training.same_run import check_before_data
from cm_diffusers.engine.training.tracking import check_trackers, start_trackers
from cm_diffusers.engine.training.trainer import Trainer
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.sampling import LORA_FILE


def main(argv: Sequence[str] | None, methods: Sequence[str], description: str) -> None:
    """Run a training script: parse the command line, train, and export the model.

    User errors end the program with a message and exit code 2.

    Args:
        argv: the command-line arguments; None for those of the process.
        methods: names of the methods that the script trains; the first is the default.
        description: the text of `--help`.
    """
    with ends_with_a_line():
        config = parse_config(sys.argv[1:] if argv is None else argv, methods, in_these_words(description))
        if config.run.dry_run:
            notes = list(config.notes)
            for name in ("num_train_epochs", "minutes"):
                if getattr(config.run, name) is not None:
                    notes.append(f"--{name} sets max_train_steps when the run begins.")
            print("".join(f"# {note}\n" for note in notes) + config.resolved().to_yaml(), end="")
        else:
            try:
                train(config)
            except Stopped as stop:
                stop.end()


def train(config: Config) -> Path:
    """Train or resume the run of `config`, export the model, and return the folder of its pipeline.

    Raises:
        ValueError: the settings or data are invalid, or the run can't continue.
        Stopped: the run was asked to stop. If it had begun to train, its state is saved.
    """
    with unbroken_output(), Stopping() as stopping, arithmetic(config.run):
        try:
            return _train(config, stopping)
        except Stopped as stop:
            if int(os.environ.get("RANK", 0)) == 0:
                tqdm.write(stop.message)
            raise


def _train(config: Config, stopping: Stopping) -> Path:
    config = config.resolved()
    run = config.run
    folder = Path(run.output_dir)
    disable_progress_bar()
    check_trackers(run.trackers)
    precision, warning = choose_precision(OBJECTIVES[config.method], run.mixed_precision)
    accelerator = start_accelerator(
        mixed_precision=precision,
        log_with=run.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / run.logging_dir)),
    )
    check_device(precision, accelerator.device)
    with together(accelerator):
        if accelerator.is_main_process:
            check_ours(folder)
    lock = lock_folder(folder) if accelerator.is_main_process else None
    try:
        for line in look_over(folder) if accelerator.is_main_process else ():
            tqdm.write(line)
        for note in config.notes if accelerator.is_main_process else ():
            tqdm.write(note)
        publisher = None
        if accelerator.is_main_process and run.push_to_hub:
            publisher = Publisher(run.hub_model_id, run.hub_private_repo, tqdm.write)
            publisher.check()
            remove(folder / RunFiles.FOR_HUB)  # left by a run that was killed
        with together(accelerator):
            if accelerator.is_main_process:
                if run.resume_from_hub and not any(folder.glob("checkpoint-*")):
                    step = fetch_checkpoint(run.resume_from_hub, folder)
                    tqdm.write(f"Fetched the checkpoint of step {step} from {run.resume_from_hub}.")
                check_before_data(config, folder, accelerator.num_processes)
                if run.resume_from_checkpoint not in (None, "latest"):
                    tqdm.write(go_back_to(folder, Path(run.resume_from_checkpoint).name))
        trainer = build_trainer(within_budget(config, accelerator, stopping), accelerator)
        run = trainer.run
        if warning is not None:
            trainer.say(f"WARNING: {warning}")
        if accelerator.is_main_process:
            _check_end(trainer, publisher)
        resumed = trainer.resume()
        with together(accelerator):
            if accelerator.is_main_process:
                _say_what_it_is(trainer, folder)
        goal = [run.max_train_steps, run.export_weights, run.export_variant]
        goal = json.dumps(goal + [choice for choice in (run.search_levels, run.fuse) if choice])
        if resumed and trainer.step >= run.max_train_steps and _holds(folder, goal):
            trainer.say(f"This run is finished. Its model is in {folder / RunFiles.MODEL}.")
        else:
            if run.trackers:
                start_trackers(accelerator, trainer.config, trainer.step)
            if publisher is not None and run.hub_strategy == "every_save":
                trainer.on_save = lambda: _publish_checkpoint(trainer, publisher, folder)
            stopping.remark = "during the export of the model; the same command exports it again."
            trainer.fit(stopping)
            with together(accelerator):
                if accelerator.is_main_process:
                    _export(trainer, folder / RunFiles.MODEL, publisher, last=True)
                    replace_file(folder / RunFiles.EXPORTED, goal)
                    _say_what_next(trainer, folder)
                    if publisher is not None:
                        stopping.remark = f"during the push to the Hub. {_how_to_push(publisher, folder)}"
                        _publish(publisher, folder, run.hub_timeout)
        accelerator.wait_for_everyone()
        trainer = None  # delete the distributed wrapper before its process group, or gloo can deadlock
        accelerator.free_memory()
        accelerator.end_training()
    except Stopped:
        for tracker in accelerator.trackers:
            tracker.finish()
        raise
    finally:
        if lock is not None:
            lock.release()
    return folder / RunFiles.MODEL


def _say_what_it_is(trainer: Trainer, folder: Path) -> None:
    """Write the settings and the description of the data, for people and other programs."""
    description = trainer.data.description
    settings = trainer.config.with_settings({"minutes": None, "num_train_epochs": None})  # set max_train_steps
    replace_file(folder / RunFiles.SETTINGS, f"# data: {description}\n{settings.to_yaml()}")
    if not holds(folder / RunFiles.DATA, description.to_json()):
        replace_file(folder / RunFiles.DATA, description.to_json())


def _check_end(trainer: Trainer, publisher: Publisher | None) -> None:
    """Check the model and its card before training, and warn about the teacher's licence."""
    pipeline, product = trainer.exported(), trainer.product
    product.check(pipeline)
    facts = product.facts(pipeline, trainer.summary(), {})
    card = product.card(facts, "model", trainer.folder / RunFiles.METRICS)
    if publisher is not None:
        publisher.check_card(card)
    if facts["warning"]:
        trainer.say(f"WARNING: {facts['warning']}")


def _export(trainer: Trainer, folder: Path, publisher: Publisher | None, last: bool = False) -> None:
    """Save the current model in `folder` with its card and pictures, and the facts of the card beside the folder.

    With `last`, the end of the run, the model is completed and verified.
    """
    pipeline, product = trainer.exported(), trainer.product
    if last:
        pipeline = product.completed(pipeline)
    name = publisher.repo_id if publisher is not None else trainer.folder.resolve().name

    def complete(written: Path) -> None:
        facts = product.facts(pipeline, trainer.summary(), product.grids(pipeline, written))
        product.card(facts, name, trainer.folder / RunFiles.METRICS).save(written / "README.md")
        (written / RunFiles.DATA).write_text(trainer.data.description.to_json())
        replace_file(folder.parent / RunFiles.FACTS, json.dumps(facts, indent=1))

    product.save(pipeline, folder, verify=last, complete=complete)


def _publish_checkpoint(trainer: Trainer, publisher: Publisher, folder: Path) -> None:
    """Push copies of the current model and checkpoint to the Hub in the background."""
    step = f"step-{trainer.step}"
    if publisher.waiting > 2:
        trainer.say(f"WARNING: {step} is not published, because earlier pushes are still waiting for the Hub.")
        return
    copies = folder / RunFiles.FOR_HUB / step
    _export(trainer, copies / RunFiles.MODEL, publisher)
    source, state = folder / f"checkpoint-{trainer.step}", copies / "checkpoint"
    copy_checkpoint(source, state, portable_settings(trainer.config.given))
    publisher.push(Push(copies / RunFiles.MODEL, f"Step {trainer.step}", tag=step))
    publisher.push(
        Push(
            state,
            f"State of step {trainer.step}",
            branch=CHECKPOINT_BRANCH,
            files=CHECKPOINT_FILES,
            done=lambda: shutil.rmtree(copies),
        )
    )


def _publish(publisher: Publisher, folder: Path, timeout: float) -> None:
    publisher.push(Push(folder / RunFiles.MODEL, "End of training"))
    if publisher.finish(timeout):
        print(f"Pushed to {publisher.url}.")
    else:
        print(_how_to_push(publisher, folder))


def _how_to_push(publisher: Publisher, folder: Path) -> str:
    return (
        f"The model in {folder / RunFiles.MODEL} is complete, but not all of it is on the Hub. Finish the push with:"
        f"\n  {command('push')} --model_dir {folder / RunFiles.MODEL} --hub_model_id {publisher.repo_id}"
    )


def _holds(folder: Path, export: str) -> bool:
    """Whether the last export of the run was `export`, and its files still exist."""
    model = folder / RunFiles.MODEL
    lora = model / LORA_FILE
    index = lora if lora.exists() else model / "model_index.json"
    files = [index, *model.glob("*/*.json"), *model.glob("*/*.safetensors")]
    return holds(folder / RunFiles.EXPORTED, export) and all(file.is_file() and file.stat().st_size for file in files)


def _say_what_next(trainer: Trainer, folder: Path) -> None:
    places = (("pictures", folder / RunFiles.PICTURES), ("curves", folder / RunFiles.CURVES))
    parts = [f"Saved {folder / RunFiles.MODEL}"]
    parts += [" ".join(f"{what} in {path}" for what, path in places if path.exists())]
    print(f"\n{'; '.join(filter(None, parts))}.\n{trainer.product.next_command(folder / RunFiles.MODEL)}")
