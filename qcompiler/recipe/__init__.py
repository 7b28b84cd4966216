"""Recipes: how to compile a model, as data."""

from qcompiler.recipe.load import builtin_names, load, parse, to_dict, to_yaml
from qcompiler.recipe.schema import Allow, Override, Recipe, Scheme, Select, VqScheme

__all__ = ["Allow", "Override", "Recipe", "Scheme", "Select", "VqScheme", "builtin_names", "load", "parse", "to_dict", "to_yaml"]
