"""The one reader of text that users, and other programs, write: YAML and JSON, in bounded memory and time.

Refused, each with one line: what is not UTF-8, too large or too deep, repeated keys, keys that are no text, NaN and
infinity in JSON, and values that are no text, number, truth value, null, list or mapping.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from shodh.core.errors import CheckpointError, ConfigError, ShodhError
from shodh.core.files import UNREADABLE
from shodh.core.presets import find_preset, presets

MAX_YAML = 1 << 20  # bytes; a configuration has a few thousand
MAX_JSON = 1 << 28  # an index of shards or a manifest may be long, and JSON is read fast
MAX_DEPTH = 64
MAX_NODES = 200_000  # of YAML, with aliases counted as often as they are used
ErrorKind = type[ShodhError]


def _fault(message: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    """Plain values alone, no repeated key, and no tree that is larger than its text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._open: set[str] = set()
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                raise _fault(f"*{anchor} stands in itself", event)
        elif anchor is not None:
            self._open.add(anchor)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _fault(f"more than {MAX_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._open.discard(anchor or "")
        if node is not None and self._size(node) > MAX_NODES:
            raise _fault(f"more than {MAX_NODES} values", event)
        return node

    def _size(self, node: yaml.Node) -> int:
        """Values below a node, those of aliases counted each time."""
        if id(node) not in self._sizes:
            children: list[Any] = []
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            self._sizes[id(node)] = 1 + sum(self._size(child) for child in children)
        return self._sizes[id(node)]

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise _fault("a zero byte or half a character in text", node)
        return value

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _fault("expected a mapping", node)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                message = f"the key {getattr(key, 'value', '')!r} is no text; quote it"
                raise _fault(message, key)
            if key.value in seen:
                raise _fault(f"key {key.value!r} is repeated", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _PLAIN
}
# Numbers as YAML 1.2 has them: 1e-3 is one, 010 is not eight, 1:30 is not ninety, and a date is text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":")[-1] not in ("timestamp", "int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _short(value: object, limit: int = 200) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _explain_yaml(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        return where + _short(error.problem or error.context)
    return _short(error)


def parse_yaml(text: str, source: str, error: ErrorKind = ConfigError) -> Any:
    """The tree of YAML text.

    Raises
    ------
    error
        Names ``source`` and the line.
    """
    if len(text) > MAX_YAML:
        raise error(f"{source}: has {len(text)} characters; expected at most {MAX_YAML}")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as cause:
        raise error(f"{source} is not valid YAML: {_explain_yaml(cause)}") from cause


class _Repeated(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(f"key {next(k for k in keys if keys.count(k) > 1)!r} is repeated")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def parse_json(text: str, source: str, error: ErrorKind = ConfigError) -> Any:
    """The tree of JSON text, strictly. Raises ``error``, which names ``source``."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as cause:
        raise error(f"{source} is not valid JSON: nested too deeply") from cause
    except ValueError as cause:
        where = _line_of_repetition(text) if isinstance(cause, _Repeated) else ""
        raise error(f"{source} is not valid JSON: {where}{_short(cause)}") from cause


def _line_of_repetition(text: str) -> str:
    """``line N, column M: ``, as far as YAML, which JSON nearly is, finds it."""
    try:
        parse_yaml(text, "")
    except ConfigError as error:
        place = str(error).partition("valid YAML: ")[2].partition(": ")[0]
        return f"{place}: " if place.startswith("line ") and "repeated" in str(error) else ""
    return ""


def read_text(path: Path, what: str = "file", error: ErrorKind = ConfigError, limit: int = MAX_JSON) -> str:
    """The text of a UTF-8 file. Raises ``error``, which names it, for a file that cannot be read or is too large."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as cause:  # ValueError: a name with a zero byte
        raise error(f"cannot read {what} {path}: {getattr(cause, 'strerror', None) or cause}") from cause
    if len(content) > limit:
        raise error(f"{path} is larger than the {limit} bytes that a {what} may have")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text (byte {cause.start}); save it as UTF-8") from cause


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines, oldest first; lines that are damaged, or not yet whole, are left out."""
    if path.is_file():
        with path.open(errors="replace") as file:
            for text in file:
                with suppress(*UNREADABLE):
                    if isinstance(line := json.loads(text), dict):
                        yield line


def read_settings(path: str | Path) -> Any:
    """The tree of a configuration, or of the packaged one of that name; raises `ConfigError`, which names it."""
    found = find_preset(Path(path), "configs")
    if found.parent == Path() and not found.suffix and not found.exists():
        raise ConfigError(f"there is no file {path}, and no packaged configuration of that name; they are {presets()}")
    return read_yaml(found)


def read_yaml(path: Path, what: str = "configuration", error: ErrorKind = ConfigError) -> Any:
    """The tree of a YAML file. Raises ``error``, which names it."""
    return parse_yaml(read_text(path, what, error, MAX_YAML), str(path), error)


def read_json(path: Path, what: str = "file", error: ErrorKind = ConfigError) -> Any:
    """The tree of a JSON file. Raises ``error``, which names it."""
    return parse_json(read_text(path, what, error), str(path), error)


def read_object(path: Path, error: ErrorKind = CheckpointError) -> dict[str, Any]:
    """The JSON object of a file that the project wrote; raises ``error``, which names it."""
    content = parse_json(read_text(path, "file", error), f"{path} is damaged: it", error)
    if not isinstance(content, dict):
        raise error(f"{path} is damaged: expected a JSON object, got {type(content).__name__}")
    return content
