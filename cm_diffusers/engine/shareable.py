"""Names in a run's settings that can be published: those that mean the same on every machine."""

from pathlib import Path

from cm_diffusers.objectives.options import HUB_ID, Flag


ON_THIS_MACHINE = "local"  # replaces names of local folders on a model card


def hub_id(name: str | None) -> str | None:
    """Return `name` if it can be a Hub id, or None if it is a local path, which stays private."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def portable(flag: Flag, value: str | list[str] | None) -> str | list[str] | None:
    """Return the value of a setting if it means the same on every machine, else None.

    Args:
        flag: the declaration of the setting.
        value: a name, or a list of names that are all published or none.
    """
    if isinstance(value, list):
        return value if all(portable(flag, one) for one in value) else None
    if value in flag.words:
        return value
    return None if flag.place == "path" else hub_id(value)
