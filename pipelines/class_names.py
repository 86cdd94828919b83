"""Class names and null class of a network. The names are stored in the network's config, and saved with it."""

from collections.abc import Mapping, Sequence

from diffusers import ModelMixin


NAMES_KEY = "_id2label"  # without the underscore, diffusers would warn of an unknown setting at each load


def name_classes(network: ModelMixin, id2label: Mapping[int | str, str] | None) -> None:
    """Store class names in the config of a class-conditional network.

    Pipelines then accept names as labels. When they draw labels, they draw only labels that have a name.

    Args:
        network: a network whose config has the number of classes as `num_class_embeds`.
        id2label: the name of each label that an image can have, such as {0: "cat", 1: "dog"}. A name can list several
            synonyms, separated by commas, as in ImageNet. None removes the names.

    Raises:
        ValueError: the network is unconditional, `id2label` is not a mapping or is empty, a label is outside
            [0, num_class_embeds), or a name is not text.
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
    names = {str(label): id2label[label] for label in sorted(id2label, key=int)}  # JSON has only text keys
    network.register_to_config(**{NAMES_KEY: names})


def null_class(network: ModelMixin) -> int | None:
    """Return the label of the null class, or None if `network` has none.

    A class-conditional `DiTModel` has a null class, and so has any network trained with label dropout.
    """
    transformer = any(cls.__name__ == "DiTModel" for cls in type(network).__mro__)
    knows = network.config.get("num_class_embeds") and (transformer or network.config.get("label_dropout"))
    return network.config.num_class_embeds if knows else None


def class_names(network: ModelMixin) -> dict[int, str] | None:
    """Return the class names of `network` by label, in increasing order of labels; None if it has no names."""
    names = network.config.get(NAMES_KEY)
    return None if names is None else {int(label): names[label] for label in sorted(names, key=int)}


def labels_named(id2label: Mapping[int, str] | None, names: Sequence[str]) -> list[int]:
    """Look up the labels of class names.

    A name matches the class with exactly this name, or else a class that lists it among its synonyms.

    Args:
        id2label: the class names by label; None if the model has no names.
        names: the names to look up.

    Raises:
        ValueError: `id2label` is None, or a name matches no class or several classes.
    """
    if id2label is None:
        raise ValueError(
            f"This model does not know the names of its classes; give their labels (integers), not {names}."
        )
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
