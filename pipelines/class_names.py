"""What a network knows of its classes: their names, kept in its config and so saved with it, and the one for none."""

from collections.abc import Mapping, Sequence

from diffusers import ModelMixin


NAMES_KEY = "_id2label"  # of settings without the underscore that a class does not know, diffusers warns at each load


def name_classes(network: ModelMixin, id2label: Mapping[int | str, str] | None) -> None:
    """Tell a class-conditional `network` what its classes are called, for pipelines and for whoever loads it.

    Pipelines then take names for labels, and where none are given they draw only from labels that have a name.

    Args:
        network: its config has the number of classes, `num_class_embeds`, and gets the names.
        id2label: the name of each label that an image has, such as {0: "cat", 1: "dog"}. One name may hold several,
            separated by commas, as those of ImageNet do. None forgets the names.

    Raises:
        ValueError: an unconditional network, no labels, labels outside [0, num_class_embeds), names that are no text.
    """
    if id2label is None:
        network.register_to_config(**{NAMES_KEY: None})
        return
    count = network.config.num_class_embeds
    if count is None:
        raise ValueError("The classes of an unconditional network can't be named; its num_class_embeds is None.")
    if not isinstance(id2label, Mapping) or not id2label:
        raise ValueError(f'id2label must map labels to names, such as {{0: "cat", 1: "dog"}}; got {id2label!r}.')
    for label, name in id2label.items():
        if not str(label).isdecimal() or int(label) >= count:
            raise ValueError(f"The labels of id2label must be integers in [0, {count - 1}], got {label!r}.")
        if not isinstance(name, str):
            raise ValueError(f"The names of id2label must be text, got {name!r} for the label {label}.")
    names = {str(label): id2label[label] for label in sorted(id2label, key=int)}  # text, as JSON has it
    network.register_to_config(**{NAMES_KEY: names})


def null_class(network: ModelMixin) -> int | None:
    """The label that stands for no class, where `network` was trained with one; None else."""
    transformer = any(cls.__name__ == "DiTModel" for cls in type(network).__mro__)
    knows = network.config.get("num_class_embeds") and (transformer or network.config.get("label_dropout"))
    return network.config.num_class_embeds if knows else None


def class_names(network: ModelMixin) -> dict[int, str] | None:
    """The names that `name_classes` gave, by label in rising order; None where there are none."""
    names = network.config.get(NAMES_KEY)
    return None if names is None else {int(label): names[label] for label in sorted(names, key=int)}


def labels_named(id2label: Mapping[int, str] | None, names: Sequence[str]) -> list[int]:
    """The label of each of `names`: of the class called so, else of that whose list of names holds it.

    Raises:
        ValueError: there are no names, or none or several labels of a name.
    """
    if id2label is None:
        raise ValueError(f"This model does not know the names of its classes; give their labels instead of {names}.")
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for label, name in id2label.items():
        whole.setdefault(name.strip(), []).append(label)
        for part in name.split(","):
            parts.setdefault(part.strip(), []).append(label)
    found: list[int] = []
    for name in names:
        labels = whole.get(name.strip()) or parts.get(name.strip()) or []
        if not labels:
            known = ", ".join(map(repr, list(id2label.values())[:10])) + (", ..." if len(id2label) > 10 else "")
            raise ValueError(f"This model has no class {name!r}; it has {known}. `pipe.id2label` holds all names.")
        if len(labels) > 1:
            raise ValueError(f"Several classes are called {name!r}; give one of their labels {labels}.")
        found += labels
    return found
