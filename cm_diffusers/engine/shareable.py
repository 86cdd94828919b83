"""What of a run may be told to others: names that mean the same on every machine."""

from pathlib import Path

from cm_diffusers.objectives.options import HUB_ID, Flag


ON_THIS_MACHINE = "local"  # what a card says of a name that means something on this machine only


def hub_id(name: str | None) -> str | None:
    """`name` where it can be a Hub id and not a folder of this machine, whose name is nobody's business."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def portable(flag: Flag, value: str | list[str] | None) -> str | list[str] | None:
    """A name that `flag` was given, or several, where they mean the same on every machine."""
    if isinstance(value, list):
        return value if all(portable(flag, one) for one in value) else None
    if value in flag.words:
        return value
    return None if flag.place == "path" else hub_id(value)
