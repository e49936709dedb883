"""Merges files, ``extends``, ``--set`` overrides and the environment into one tree of plain values.

Every layer (a file, then the files that extend it, then ``--set``) is merged over the ones before: mappings
key by key, anything else is replaced. ``origins`` records which layer set a value, for error messages. Values are
validated later (loading.py).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from maestro_scale import untrusted
from maestro_scale.errors import KeyPath, did_you_mean, dotted, shorten
from maestro_scale.strict_yaml import environment, shipped
from maestro_scale.strict_yaml.errors import DocumentError
from maestro_scale.strict_yaml.kinds import mistaken

_SET = "--set"
_MAX_LEVELS, _MAX_KEY = 20, 200  # of a key in --set: parts, and characters of one
# Exactly one of these keys may be set: where a later layer sets one, those of earlier layers are dropped.
_EXCLUSIVE = {"train": ("epochs", "steps")}


@dataclass(frozen=True)
class Tree:
    """A document before validation.

    ``texts``: the environment's text of values that consist of one ``${VAR}``: text fields take it as written (a run
    named 0012), all others its YAML value.
    """

    data: dict[str, Any]
    origins: Mapping[KeyPath, str]
    texts: Mapping[KeyPath, str] = field(default_factory=dict)

    def origin(self, loc: KeyPath) -> str:
        """The file (or ``--set``) that set ``loc``, or its closest parent that one set."""
        while loc and loc not in self.origins:
            loc = loc[:-1]
        return self.origins[loc]


def read_tree(path: str | Path, overrides: Sequence[str], kind: str = "recipe") -> Tree:
    """The file, what it extends, ``overrides`` and the environment, merged; DocumentError if any is invalid.

    ``path``: a file, or the name of a document that ships with the package (:mod:`.shipped`). ``kind``: of document.
    """
    written = _read_chain(locate(path, kind), (), kind)
    if mistake := mistaken(written.data, kind):
        raise DocumentError(f"{path}: {mistake}")
    tree = _with_overrides(written, overrides)
    texts: dict[KeyPath, str] = {}

    def resolved(loc: KeyPath, text: str) -> Any:
        try:
            value = environment.substitute(text, os.environ)
        except environment.Unresolved as error:
            raise DocumentError(f"{tree.origin(loc)}: {dotted(loc)}: {error}") from None
        if not environment.is_whole_reference(text):
            return value
        texts[loc] = value
        return _scalar(value)

    return Tree(environment.mapped(tree.data, resolved), tree.origins, texts)


def read_layers(path: str | Path, kind: str = "recipe") -> dict[str, Any]:
    """The data of a file merged over what it extends, with references to the environment as they are written."""
    return _read_chain(locate(path, kind), (), kind).data


def parse_yaml(text: str) -> Any:
    """YAML 1.2 scalars: ``3e-5`` is a number, ``2024-01-01`` is text; a duplicate key is an error. InputError."""
    return untrusted.load_yaml(text, loader=_Loader)


def dump_yaml(data: Any) -> str:
    """YAML that :func:`parse_yaml` reads back unchanged: text that it would read as a number is quoted."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def locate(path: str | Path, kind: str) -> Path:
    """The file ``path``, else the shipped document of that name; DocumentError if it can be neither.

    What has a suffix is a file, whether it exists or not.
    """
    file, name = Path(path), str(path)
    if file.suffix or (file.exists() and not file.is_dir()):  # a folder `quickstart` is not the recipe
        return file
    found = shipped.find(kind, name)
    if found is None:
        if file.is_dir():
            inside = file / f"{kind}.yaml"
            hint = f"{inside} is the one of this run" if inside.exists() else f"give the {kind}'s YAML file"
            raise DocumentError(f"{name}: is a folder; {hint}")
        hint = did_you_mean(name, shipped.names(kind))
        if "there are:" in hint and kind == "recipe":  # half a hundred
            hint = "; `maestro-scale recipes` lists them"
        raise DocumentError(f"{name}: is neither a file nor the name of a {kind}{hint}")
    return found


def _read_chain(path: Path, below: tuple[Path, ...], kind: str) -> Tree:
    """``path`` merged over everything it extends. ``below``: the files that led here."""
    here = path.resolve()
    if here in below:
        raise DocumentError(f"{below[-1]}: extends: a cycle: {' → '.join(p.name for p in (*below, here))}")
    data = _read_file(path, kind)
    parent = data.pop("extends", None)
    layer = Tree({k: v for k, v in data.items() if v is not None}, dict(_origins(data, str(path))))
    if parent is None:
        return layer
    if not isinstance(parent, str):
        raise DocumentError(f"{path}: extends: must be the path of one {kind}, got {parent!r}")
    try:
        target = path.parent / Path(environment.substitute(parent, os.environ)).expanduser()
    except environment.Unresolved as error:
        raise DocumentError(f"{path}: extends: {error}") from None
    if not target.suffix and (named := shipped.find(kind, parent)) is not None:
        target = named
    if not target.is_file():
        there = [p.name for p in target.parent.glob("*.yaml")] if target.parent.is_dir() else []
        raise DocumentError(f"{path}: extends: {target} does not exist{did_you_mean(target.name, there)}")
    base = _read_chain(target, (*below, here), kind)
    return Tree(
        _merged(_without_exclusive(base.data, layer.data), layer.data), {**base.origins, **layer.origins}
    )


def _read_file(path: Path, kind: str) -> dict[str, Any]:
    try:
        data = parse_yaml(untrusted.read_bytes(path, untrusted.RECIPE, pipe=True).decode())
    except OSError as error:
        there = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, there) if there else ""
        if shipped.find(kind, path.stem) is not None:
            hint = f"; the {kind} that comes with maestro-scale is called {path.stem}"
        raise DocumentError(f"{path}: cannot read the {kind}: {error.strerror}{hint}") from None
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{path}: byte {error.start} is not UTF-8: save the {kind} as UTF-8 text"
        ) from None
    except untrusted.InputError as error:
        raise DocumentError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise DocumentError(
            f"{path}: a {kind} is a mapping of sections, this file holds a {type(data).__name__}"
        )
    return data


def _merged(base: Any, layer: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(layer, dict)):
        return copy.deepcopy(layer)
    return {**base, **{key: _merged(base.get(key), value) for key, value in layer.items()}}


def _without_exclusive(base: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` without exclusive keys where ``layer`` sets one of them."""
    for section, keys in _EXCLUSIVE.items():
        new, old = layer.get(section), base.get(section)
        if isinstance(new, dict) and isinstance(old, dict) and any(new.get(key) is not None for key in keys):
            base = {**base, section: {k: v for k, v in old.items() if k not in keys}}
    return base


def _origins(node: Any, source: str, loc: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    yield loc, source
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _origins(value, source, (*loc, str(key)))


def _with_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    parsed = [_parse_override(text) for text in overrides]
    layer: dict[str, Any] = {}
    for loc, value in parsed:
        if not any(isinstance(part, int) for part in loc):
            layer = _merged(layer, _nested(loc, value))
    data, origins = copy.deepcopy(_without_exclusive(tree.data, layer)), dict(tree.origins)
    for loc, value in parsed:
        data = _assigned(data, loc, value, ())
        for i in range(1, len(loc)):
            if isinstance(loc[i], int):
                break  # the list itself came from a file
            origins.setdefault(loc[:i], _SET)
        origins.update((loc + sub, source) for sub, source in _origins(value, _SET))
    return Tree(data, origins)


def _parse_override(text: str) -> tuple[KeyPath, Any]:
    """``data.mixture[0].shards=x`` or ``data.mixture.0.shards=x`` → path and YAML value."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[^.\[\]\s]+(\.[^.\[\]\s]+|\[\d+\])*", key):
        raise DocumentError(f"{_SET}: {shorten(text, 200)} is not section.key=value (one word, no spaces)")
    if not value.strip():
        raise DocumentError(
            f"{_SET}: {shorten(key)} has no value; null resets it to its default, \"''\" is no text"
        )
    parts = re.findall(r"[^.\[\]]+", key)
    if len(parts) > _MAX_LEVELS or any(len(part) > _MAX_KEY for part in parts):
        raise DocumentError(f"{_SET}: {shorten(key)} is longer than any key")
    try:
        return tuple(int(p) if p.isdecimal() else p for p in parts), parse_yaml(value)
    except untrusted.InputError as error:
        raise DocumentError(f"{_SET}: {key}: {error}") from None


def _nested(loc: KeyPath, value: Any) -> Any:
    return {loc[0]: _nested(loc[1:], value)} if loc else value


def _assigned(node: Any, loc: KeyPath, value: Any, done: KeyPath) -> Any:
    """``node`` with ``value`` at ``loc``; missing mappings on the way are created. ``done``: path of ``node``."""
    if not loc:
        return _merged(node, value)
    head, rest = loc[0], loc[1:]
    if isinstance(node, list):
        if not isinstance(head, int) or head >= len(node):
            raise DocumentError(
                f"{_SET}: {dotted((*done, head))}: {dotted(done)} is a list of {len(node)}: "
                f"use {dotted(done)}[0]{f' to [{len(node) - 1}]' if len(node) > 1 else ''}"
            )
        return [_assigned(v, rest, value, (*done, i)) if i == head else v for i, v in enumerate(node)]
    if isinstance(head, int) or not isinstance(node, dict | None):
        what = "nothing yet" if node is None else f"{node!r}" if not isinstance(node, dict) else "a mapping"
        raise DocumentError(
            f"{_SET}: {dotted((*done, *loc))}: {dotted(done)} is {what}, so it has no {head!r}"
        )
    node = node or {}
    return {**node, head: _assigned(node.get(head), rest, value, (*done, head))}


def _scalar(text: str) -> Any:
    try:
        return parse_yaml(text)
    except untrusted.InputError:
        return text


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats, without timestamps, refusing duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key, Hashable):
                continue  # the base class expands the one and refuses the other
            if key in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shorten(key)} is given twice", key_node.start_mark
                )
            found.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
