"""Recipes by name, from YAML, and back to YAML."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from qcompiler.errors import InputError, UsageError
from qcompiler.recipe.errors import unknown_key
from qcompiler.recipe.schema import Allow, Calibration, Override, Recipe, Scheme, Select, VqScheme

_CLASSES = (Recipe, Scheme, VqScheme, Select, Override, Calibration, Allow)
_KINDS = ("Scheme", "VqScheme", "float")  # tags of a union: no part of the user's path
_FIELDS = {cls.__name__: [f.name for f in dataclasses.fields(cls)] for cls in _CLASSES}


def builtin_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("qcompiler.recipe") / "builtin"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(source: str | Path | dict | Recipe) -> Recipe:
    """A recipe from the name of a built-in one, a YAML file, a mapping, or a Recipe as it is.

    Raises:
        UsageError: unknown name, unknown or ill-typed key (with the nearest known one).
        InputError: a file that cannot be read or is not YAML.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, dict):
        return parse(source, "recipe")
    text = str(source)
    if text in builtin_names():
        return parse(
            yaml.safe_load((resources.files("qcompiler.recipe") / "builtin" / f"{text}.yaml").read_text("utf-8")), text
        )
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json") and not path.exists():
        raise UsageError(unknown_key("recipe", text, builtin_names()) + "; or give a YAML file")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"recipe {text}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {text}: not YAML: {error}") from error
    return parse(data, text)


def parse(data: Any, where: str) -> Recipe:
    """A mapping as read from YAML -> Recipe; every problem is named with its path."""
    if not isinstance(data, dict):
        raise UsageError(f"recipe {where}: expected a mapping, found {type(data).__name__}")
    try:
        return TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(e, where) for e in error.errors())) from error


def _explain(error: Any, where: str) -> str:
    parts = [str(part) for part in error["loc"]]
    path = [part for part in parts if part not in _KINDS and not part.startswith(("literal[", "function-"))]
    place = f"recipe {where}: {'.'.join(path)}"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = {
            "linear": "Scheme",
            "embed": "Scheme",
            "head": "Scheme",
            "scheme": "Scheme",
            "instead": "Scheme",
            "select": "Select",
            "allow": "Allow",
            "calibration": "Calibration",
        }
        parent = path[-2] if len(path) > 1 else ""
        owner |= {parent: "VqScheme"} if "VqScheme" in parts and parent != "instead" else {}
        known = _FIELDS[owner.get(parent, "Override" if parent.isdigit() else "Recipe")]
        return f"{place}: {unknown_key('key', path[-1], known)}"
    if error["type"] == "missing":
        return f"{place}: required key is missing"
    if error["type"] == "value_error":  # our own: it says what was found
        return f"{place}: {error['msg'].removeprefix('Value error, ')}"
    return f"{place}: {error['msg']}; found {error['input']!r}"


def to_dict(recipe: Recipe) -> dict:
    """The recipe as resolved, every default written out; `parse(to_dict(r)) == r`."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    result = plain(dataclasses.replace(recipe, passes=()))
    result["passes"] = [{step.name: plain(step)} for step in recipe.passes]
    return result


def to_yaml(recipe: Recipe) -> str:
    """Canonical YAML of the recipe as resolved."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
