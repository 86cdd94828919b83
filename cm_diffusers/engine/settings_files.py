"""YAML from users: within stated limits, and each key once."""

from pathlib import Path
from typing import Any

import yaml

from cm_diffusers.engine.files import read_plain


BYTES = 256 << 10  # those of recipes have less than 2 KiB
NODES = 10_000  # values and keys, with all that aliases repeat
DEPTH = 20


def read_yaml(path: Path, named: bool = False) -> Any:
    """The YAML of a file, in plain types.

    Args:
        path: of the file.
        named: whether a person named it, who may mean a pipe (`--config <(command)`, /dev/stdin).

    Raises:
        OSError: it can't be read.
        ValueError: it is not a file, not YAML, larger than the limits above, or gives a key twice; the message goes on
            after the file's name.
    """
    if named and path.is_fifo():
        with open(path, "rb") as pipe:
            data = pipe.read(BYTES + 1)
        if len(data) > BYTES:
            raise TooMuch(f"has more than {BYTES} bytes")
    else:
        data = read_plain(path, limit=BYTES)
    try:
        text = data.decode("utf-8")
        _check(text)
        return yaml.load(text, Loader=_Loader)
    except TooMuch:
        raise
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's, which leaves errors of values such as 2024-99-99 and !!int x without their place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode):
                try:
                    self.construct_object(value)
                except yaml.YAMLError:
                    raise
                except Exception as error:  # of many kinds
                    problem = f"the value of {key.value!r} can't be read: {error}"
                    raise yaml.constructor.ConstructorError(None, None, problem, value.start_mark) from None
        return super().construct_mapping(node, deep)


class TooMuch(ValueError):
    """YAML that goes beyond the limits, or gives a key twice."""


class _Open:
    """A list or mapping whose end has not come: how much it holds, and of a mapping its keys."""

    def __init__(self, anchor: str | None, is_mapping: bool):
        self.anchor, self.is_mapping = anchor, is_mapping
        self.nodes, self.depth, self.parts, self.keys = 1, 1, 0, set()


def _check(text: str) -> None:
    """Walk the events of YAML, which nest and expand nothing, and raise TooMuch before anything is made of them."""
    open_, known = [_Open(None, False)], {}  # known: nodes and depth of what has an anchor
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_) - 1 > DEPTH:
                raise TooMuch(f"nests more than {DEPTH} levels deep (line {line}).")
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(part.anchor == event.anchor for part in open_):
                raise TooMuch(f"holds itself, by *{event.anchor} (line {line}).")
            nodes, depth = known.get(event.anchor, (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            nodes, depth = 1, 0
            _check_key(open_[-1], event, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = open_.pop()
            nodes, depth = ended.nodes, ended.depth
            event.anchor = ended.anchor
        else:
            continue
        if getattr(event, "anchor", None) is not None:
            known[event.anchor] = nodes, depth
        parent = open_[-1]
        parent.nodes, parent.depth, parent.parts = parent.nodes + nodes, max(parent.depth, depth + 1), parent.parts + 1
        if sum(part.nodes for part in open_) > NODES:
            raise TooMuch(f"holds more than {NODES} values, with those that aliases repeat (line {line}).")
        if len(open_) - 1 + depth > DEPTH:
            raise TooMuch(f"nests more than {DEPTH} levels deep (line {line}).")


def _check_key(part: _Open, event: yaml.ScalarEvent, line: int) -> None:
    """Raise TooMuch for a key that its mapping has already; keys and values take turns."""
    if part.is_mapping and part.parts % 2 == 0:
        if event.value in part.keys:
            raise TooMuch(f"gives {event.value!r} twice (the second time in line {line}).")
        part.keys.add(event.value)
