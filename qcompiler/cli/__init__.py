"""The command line. Data goes to stdout, messages and progress to stderr."""

from qcompiler.cli.main import main

__all__ = ["main"]
