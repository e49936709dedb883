"""Bounded parsing of YAML: the events of a document are checked before a loader creates values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from maestro_scale.errors import shorten
from maestro_scale.untrusted.documents import check_size
from maestro_scale.untrusted.limits import RECIPE, YAML_INTEGER_CHARACTERS, InputError, Limits, at


def load_yaml(text: str, where: str = "", limits: Limits = RECIPE, loader: Any = None) -> Any:
    """Parse one YAML document within ``limits``, which count aliases expanded.

    ``loader``: a subclass of yaml.SafeLoader, which is the default. Of the explicit tags only ``!!str`` is accepted,
    because the constructors of the others raise errors of any type.

    Raises:
        InputError: not YAML, too large, nested too deep, or with an alias that is recursive or exceeds the limits.
    """
    import yaml

    check_size(len(text), where, limits)
    # libyaml's parser where it is installed; it gives the same events.
    parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=parser), limits)
        return yaml.load(text, Loader=loader or yaml.SafeLoader)
    except InputError as error:
        raise InputError(at(where, str(error))) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(at(where, f"is not valid YAML: {_problem(error, text)}")) from None


def _problem(error: Exception, text: str) -> str:
    """What a parser says, in one line; with the usual cause where tabs are among the indentation."""
    mark = getattr(error, "problem_mark", None)
    line = text.splitlines()[mark.line : mark.line + 1] if mark is not None else []
    hint = "; indent with spaces, not tabs" if line and "\t" in line[0] else ""
    return " ".join(str(error).replace(' in "<unicode string>",', " in").split()) + hint


_INTEGER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0?[ob]?[0-9_:]+)")  # 1:30 is one in base 60


class _Subtree:
    """Nodes and levels of a part of a YAML document, its aliases expanded."""

    __slots__ = ("anchor", "height", "nodes")

    def __init__(self, anchor: str | None, nodes: int = 1, height: int = 1) -> None:
        self.anchor, self.nodes, self.height = anchor, nodes, height


def _check_events(events: Iterable[Any], limits: Limits) -> None:
    import yaml

    anchors: dict[str, _Subtree | None] = {}  # None: still open
    open_nodes: list[_Subtree] = []
    count = 0
    for event in events:
        count += 1
        if count > 4 * limits.entries:  # also comments between documents, which have no nodes
            raise InputError(f"has more than {limits.entries} entries")
        if isinstance(event, yaml.AliasEvent):
            name = event.anchor or ""
            if name in anchors and anchors[name] is None:
                raise InputError(f"alias {shorten(name)} is within what it refers to")
            target = anchors.get(name) or _Subtree(None)  # the loader reports an unknown one
            done = _Subtree(None, target.nodes, target.height)
        elif isinstance(event, yaml.CollectionStartEvent):
            _check_tag(event)
            if event.anchor:
                anchors[event.anchor] = None
            open_nodes.append(_Subtree(event.anchor))
            if len(open_nodes) > limits.depth:
                raise InputError(f"is nested more than {limits.depth} levels deep")
            continue
        elif isinstance(event, yaml.ScalarEvent):
            _check_tag(event)
            if len(event.value) > limits.text:
                raise InputError(f"contains a text of more than {limits.text} characters")
            # Python parses long integers in quadratic time, and refuses to print more than 4,300 digits.
            # And many keys of equal hashes fill a dict in quadratic time.
            is_long = len(event.value) > YAML_INTEGER_CHARACTERS
            if event.implicit[0] and is_long and _INTEGER.fullmatch(event.value):
                raise InputError(f"contains an integer of more than {YAML_INTEGER_CHARACTERS} digits")
            done = _Subtree(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            done = open_nodes.pop()
        else:
            continue
        if done.anchor:
            anchors[done.anchor] = done
        if open_nodes:
            parent = open_nodes[-1]
            parent.nodes += done.nodes
            parent.height = max(parent.height, done.height + 1)
            if parent.nodes > limits.entries:
                raise InputError(f"has more than {limits.entries} entries, with its aliases expanded")
            if len(open_nodes) + done.height > limits.depth:
                raise InputError(f"is nested more than {limits.depth} levels deep, with its aliases expanded")


def _check_tag(event: Any) -> None:
    if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
        raise InputError(f"the tag {shorten(event.tag)} is not supported")
