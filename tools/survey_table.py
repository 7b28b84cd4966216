"""What a survey of architectures found, as a page."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, dict]) -> str:
    """Counts, what works by name, and a row for every type that does not."""
    groups: dict[str, dict[str, dict]] = {}
    for name, result in sorted(results.items()):
        groups.setdefault(_outcome(result), {})[name] = result
    counts = [f"| {outcome} | {len(groups[outcome])} |" for outcome in OUTCOMES if outcome in groups]
    lines = ["| outcome | types |", "|---|---|", *counts, f"| surveyed | {len(results)} |"]
    for outcome in OUTCOMES[:2]:
        names = [name + _limited(result) for name, result in groups.get(outcome, {}).items()]
        lines += ["", f"**{outcome.capitalize()}:** {', '.join(names)}."] if names else []
    for outcome in OUTCOMES[2:]:
        if outcome in groups:
            lines += ["", f"## {outcome.capitalize()}", "", "| type | class | reason |", "|---|---|---|"]
            lines += [f"| {name} | {r['class']} | {_cell(r.get('reason', ''))} |" for name, r in groups[outcome].items()]
    return "\n".join(lines)


OUTCOMES = (
    "compiled and equal", "captured and equal", "captured, not compiled", "refused, traced by the exporter",
    "refused, not traced by the exporter either", "no small configuration",
)  # fmt: skip


def _limited(result: dict[str, Any]) -> str:
    """What a user of the type meets, in brackets: how many tokens at once, which form in place of the usual one."""
    step = result.get("step", "any number")
    found = [f"{step} a step"] if step != "any number" and result["form"] == "decoder" else []
    found += ["whole text"] if result.get("whole_text") else []
    if fixed := result.get("fixed"):
        found.append(f"one length, {fixed['tokens']} tokens" + ("" if fixed["exact"] else ", filling up changes a text"))
    elif result.get("longest"):
        found.append(f"at most {result['longest']} tokens")
    found += ["one text at a time"] if result.get("one_row") else []
    found += ["as an encoder"] if result["form"] == "decoder" and result.get("captured_as") == "encoder" else []
    found += ["text path alone"] if result.get("left_out") else []
    return f" ({', '.join(found)})" if found else ""


def _cell(reason: str) -> str:
    return reason.replace("|", "/")[:220]


def _outcome(result: dict[str, Any]) -> str:
    if not result.get("built"):
        return OUTCOMES[5]
    if result.get("compiled"):
        return OUTCOMES[0]
    if result.get("captured"):
        return OUTCOMES[1] if result.get("compiled") is None else OUTCOMES[2]
    return OUTCOMES[3] if result.get("exporter") else OUTCOMES[4]
