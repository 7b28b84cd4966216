"""Difference of two canonical graph texts: nodes that appeared, vanished or changed; what is equal is hidden.

%q = aten.linear(%x, %w)                      ~ %q
%n = aten.add(%q, %b)            ─▶             - aten.linear(%x, %w)
                                                + qcompiler.linear_nbit(%x, %w_codes, %w_scales)
                                              - %n = aten.add(%q, %b)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

# The name of a node ends at the first of these.
_NAME_END = re.compile(r"[=:]")


@dataclass(frozen=True)
class GraphDiff:
    """Lines that appeared (name, line), vanished (name, line), changed (name, before, after), in graph order."""

    appeared: tuple[tuple[str, str], ...]
    vanished: tuple[tuple[str, str], ...]
    changed: tuple[tuple[str, str, str], ...]
    unchanged: int

    @property
    def empty(self) -> bool:
        """Whether the two graphs say the same."""
        return not (self.appeared or self.vanished or self.changed)

    def to_dict(self) -> dict[str, object]:
        """The JSON face."""
        return {
            "appeared": [{"node": name, "after": line} for name, line in self.appeared],
            "vanished": [{"node": name, "before": line} for name, line in self.vanished],
            "changed": [{"node": name, "before": old, "after": new} for name, old, new in self.changed],
            "unchanged": self.unchanged,
        }

    def lines(self) -> list[str]:
        """The face for people; the first two characters say what happened."""
        out = [f"+ {line}" for _, line in self.appeared]
        out += [f"- {line}" for _, line in self.vanished]
        for name, old, new in self.changed:
            out += [f"~ {name}", f"    {old}", f"    {new}"]
        out.append(f"  {self.unchanged} nodes unchanged")
        return out


def diff_graphs(before: str, after: str) -> GraphDiff:
    """Compare two canonical texts node by node."""
    old, new = _nodes(before), _nodes(after)
    old_keys, new_keys = dict(old), dict(new)
    changed = tuple((key, old_keys[key], line) for key, line in new if key in old_keys and old_keys[key] != line)
    return GraphDiff(
        appeared=tuple((key, line) for key, line in new if key not in old_keys),
        vanished=tuple((key, line) for key, line in old if key not in new_keys),
        changed=changed,
        unchanged=sum(1 for key, line in new if old_keys.get(key) == line),
    )


def diff_lines(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Lines that differ, marked `- ` and `+ `, without context: for recipes and other short texts."""
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    out = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            out += [f"- {line}" for line in before[i1:i2]] + [f"+ {line}" for line in after[j1:j2]]
    return out


def _nodes(text: str) -> list[tuple[str, str]]:
    """(name, line) of every line that is not empty; a name that comes twice is counted, so no line is lost."""
    nodes: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    for line in text.splitlines():
        line = " ".join(line.split())
        if not line:
            continue
        key = _NAME_END.split(line, maxsplit=1)[0].strip()
        seen[key] = seen.get(key, 0) + 1
        nodes.append((key if seen[key] == 1 else f"{key} #{seen[key]}", line))
    return nodes
