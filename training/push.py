"""Publish a saved model on the Hub: the folder `pipeline` of a run, with its card.

    python training/push.py --model_dir runs/mine/pipeline --hub_model_id user/my-model
    python training/push.py --model_dir runs/mine/pipeline --hub_model_id user/my-model --space

With --space its demo (`python -m cm_diffusers.demo`) is published as well, as the Space of the same name. The token
comes from `hf auth login` or the environment's HF_TOKEN. Only what a model and its demo consist of is sent: no logs,
no checkpoints. The same command again sends what is missing.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
import argparse
import tempfile
from pathlib import Path

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.engine.sharing.card import renew_card
from cm_diffusers.engine.sharing.hub import Publisher, Push
from cm_diffusers.engine.sharing.space import SPACE, write_space


def push(args: argparse.Namespace) -> bool:
    """Whether all has arrived. Raises ValueError for what can't be pushed, or not there."""
    if not (args.model_dir / "model_index.json").is_file():
        raise ValueError(f"model_dir {str(args.model_dir)!r} is not a model: it holds no model_index.json.")
    publisher = Publisher(args.hub_model_id or args.model_dir.resolve().parent.name, args.hub_private_repo)
    publisher.check(now=True)
    renew_card(args.model_dir, publisher.repo_id)
    publisher.push(Push(args.model_dir, "Upload model", args.tag))
    if not publisher.finish(args.hub_timeout):
        return False
    print(f"Pushed to {publisher.url}.")
    return not args.space or push_space(args, publisher.repo_id)


def push_space(args: argparse.Namespace, model: str) -> bool:
    """The same for the Space of `model`, which is on the Hub."""
    publisher = Publisher(model, args.hub_private_repo, kind="space")
    publisher.check(now=True)
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), model, args.model_dir)
        publisher.push(Push(Path(folder), "Upload demo", files=SPACE))
        if not publisher.finish(args.hub_timeout):
            return False
    print(f"Pushed its demo to {publisher.url}.")
    if args.hub_private_repo:
        print("It reads the private model once it has a secret HF_TOKEN (in the Space's settings).")
    return True


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("push", __doc__)
    add = parser.add_argument
    add("--model_dir", type=Path, required=True, help="folder with model_index.json")
    add("--hub_model_id", help="user/name, or name (the name of the run's folder)")
    add("--space", action="store_true", help="publish its demo, too, as a Space of the same name")
    add("--hub_private_repo", action="store_true", help="repositories that have to be made are private")
    add("--hub_timeout", type=float, default=120, help="seconds to keep trying while the Hub is out of reach (120)")
    add("--tag", help="tag the revision, for example step-10000")
    args = parser.parse_args(argv)
    with ends_with_a_line("--model_dir", "give the same command again"):
        done = push(args)
    if not done:
        print(
            f"Not all of it is on the Hub after {args.hub_timeout:g} s. The same command again sends what is missing."
        )
    raise SystemExit(0 if done else 1)


if __name__ == "__main__":
    main()
