"""A YAML reader for files from users, with limits on size and depth, that refuses repeated keys."""

from pathlib import Path
from typing import Any

import yaml

from cm_diffusers.engine.files import read_plain


BYTES = 256 << 10  # recipes have less than 2 KiB
NODES = 10_000  # values and keys, including those that aliases repeat
DEPTH = 20


def read_yaml(path: Path, named: bool = False) -> Any:
    """Read a YAML file into plain Python types.

    Args:
        path: the file.
        named: whether the user named the file, which can then be a pipe (`--config <(command)`, /dev/stdin).

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a file, not YAML, beyond the limits above, or repeats a key. The message has the file as
            its subject, so that callers put the name of the file before it.
    """
    if named and path.is_fifo():
        with open(path, "rb") as pipe:
            data = pipe.read(BYTES + 1)
        if len(data) > BYTES:
            raise TooMuch(f"has more than {BYTES} bytes.")
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
    """PyYAML's safe loader, which also reports the position of values such as 2024-99-99 and `!!int x`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, after a check that each of its scalar values can be read."""
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode):
                try:
                    self.construct_object(value)
                except yaml.YAMLError:
                    raise
                except Exception as error:  # constructors raise many kinds
                    problem = f"the value of {key.value!r} can't be read: {error}"
                    raise yaml.constructor.ConstructorError(None, None, problem, value.start_mark) from None
        return super().construct_mapping(node, deep)


class TooMuch(ValueError):
    """YAML beyond the limits, or with a repeated key."""


class _Open:
    """A list or mapping that is still open: its size and depth so far, and the keys of a mapping."""

    def __init__(self, anchor: str | None, is_mapping: bool):
        self.anchor, self.is_mapping = anchor, is_mapping
        self.nodes, self.depth, self.parts, self.keys = 1, 1, 0, set()


def _check(text: str) -> None:
    """Raise TooMuch from the parser's events alone, before any value is built or any alias expanded."""
    open_, known = [_Open(None, False)], {}  # known: nodes and depth by anchor
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_) - 1 > DEPTH:
                raise TooMuch(f"nests more than {DEPTH} levels deep (line {line}).")
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(part.anchor == event.anchor for part in open_):
                raise TooMuch(f"contains itself, through *{event.anchor} (line {line}).")
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
            raise TooMuch(f"holds more than {NODES} values, including those that aliases repeat (line {line}).")
        if len(open_) - 1 + depth > DEPTH:
            raise TooMuch(f"nests more than {DEPTH} levels deep (line {line}).")


def _check_key(part: _Open, event: yaml.ScalarEvent, line: int) -> None:
    """Raise TooMuch if `event` is a key that its mapping already has; keys and values alternate."""
    if part.is_mapping and part.parts % 2 == 0:
        if event.value in part.keys:
            raise TooMuch(f"repeats the key {event.value!r} (line {line}).")
        part.keys.add(event.value)
