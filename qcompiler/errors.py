"""Errors that reach a user, each with the exit code of the command line.

An error names the file, node or layer, says what was found, what was expected and what to do. Anything that is not a
`QCompilerError` is a bug and ends with exit code 1.
"""

from __future__ import annotations


class QCompilerError(Exception):
    """Base of every error that a user can act on."""

    exit_code = 1


class UsageError(QCompilerError):
    """The command or call itself is wrong: an unknown option, recipe or key."""

    exit_code = 2


class InputError(QCompilerError):
    """Something given cannot be read or is refused: no such file, a corrupt checkpoint, NaN in a weight."""

    exit_code = 3


class UnsupportedError(QCompilerError):
    """The model, an op or a format is outside what the chosen target can express."""

    exit_code = 4


class GateError(QCompilerError):
    """A verification or quality gate failed: a damaged artifact, a pass that matched nothing, too many fallbacks."""

    exit_code = 5


class CapacityError(QCompilerError):
    """It would not fit: memory, disk, size budget, or a prompt beyond the context."""

    exit_code = 6


class Stopped(QCompilerError):
    """Stopped on request at a point from which it can be resumed."""

    exit_code = 75
