"""Publish a saved model with its model card on the Hub, and on request a demo as a Space.

For users who want to share the model of a run (its folder `pipeline`) after training.

    python training/push.py --model_dir runs/mine/pipeline --hub_model_id user/my-model
    python training/push.py --model_dir runs/mine/pipeline --hub_model_id user/my-model --space

The token comes from `hf auth login` or the environment variable HF_TOKEN. Only the files of the model and its demo are
sent, no logs or checkpoints. If a push was incomplete, the same command sends the rest.

--space also publishes the demo (`python -m cm_diffusers.demo`) as a Space with the name of the model.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
import argparse
import tempfile
from pathlib import Path

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.engine.sharing.card import renew_card
from cm_diffusers.engine.sharing.hub import Publisher, Push
from cm_diffusers.engine.sharing.space import SPACE, write_space
from cm_diffusers.engine.text.card import card_of_any_model
from cm_diffusers.engine.text.export import is_text_to_image
from cm_diffusers.sampling import LORA_FILE


def push(args: argparse.Namespace) -> bool:
    """Push the model, and its demo on request. Returns whether everything has arrived.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: the folder holds no model, the Hub is unreachable, or it refuses the name or the token.
    """
    if not any((args.model_dir / file).is_file() for file in ("model_index.json", LORA_FILE)):
        raise ValueError(
            f"model_dir {str(args.model_dir)!r} is not a model: it has no model_index.json or {LORA_FILE}. Give the"
            " folder pipeline of a run."
        )
    if args.space and is_text_to_image(args.model_dir):
        raise ValueError("space: the demo shows no text-to-image models. Leave out --space.")
    publisher = Publisher(args.hub_model_id or args.model_dir.resolve().parent.name, args.hub_private_repo)
    publisher.check(now=True)
    renew_card(args.model_dir, publisher.repo_id, card_of_any_model)
    publisher.push(Push(args.model_dir, "Upload model", args.tag))
    if not publisher.finish(args.hub_timeout):
        return False
    print(f"Pushed to {publisher.url}.")
    return not args.space or push_space(args, publisher.repo_id)


def push_space(args: argparse.Namespace, model: str) -> bool:
    """Push the demo of a model as a Space. Returns whether everything has arrived.

    Args:
        args: the parsed command line.
        model: the Hub id of the model, which is on the Hub already.

    Raises:
        ValueError: the Hub is unreachable, or it refuses the name or the token.
    """
    publisher = Publisher(model, args.hub_private_repo, kind="space")
    publisher.check(now=True)
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), model, args.model_dir)
        publisher.push(Push(Path(folder), "Upload demo", files=SPACE))
        if not publisher.finish(args.hub_timeout):
            return False
    print(f"Pushed its demo to {publisher.url}.")
    if args.hub_private_repo:
        print(
            "The model is private: add a secret HF_TOKEN in the settings of the Space, so that it can read the model."
        )
    return True


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    parser = parser_of("push", __doc__)
    add = parser.add_argument
    add("--model_dir", type=Path, required=True, help="Folder of the model, with model_index.json.")
    add(
        "--hub_model_id",
        help="Hub repository, as user/name or name. Default: the name of the folder above --model_dir.",
    )
    add("--space", action="store_true", help="Also publish a demo as a Space of the same name.")
    add("--hub_private_repo", action="store_true", help="Make Hub repositories private if they are created.")
    add(
        "--hub_timeout",
        type=float,
        default=120,
        help="Seconds to keep trying while the Hub is unreachable. Default: 120.",
    )
    add("--tag", help="Git tag for the pushed revision, for example step-10000. Default: none.")
    args = parser.parse_args(argv)
    with ends_with_a_line("--model_dir", "give the same command again"):
        done = push(args)
    if not done:
        print(f"The push is incomplete after {args.hub_timeout:g} s. Run the same command again to send the rest.")
    raise SystemExit(0 if done else 1)


if __name__ == "__main__":
    main()
