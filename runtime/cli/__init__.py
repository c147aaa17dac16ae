"""The command line. Importing it is cheap: what is heavy loads when a command needs it."""

from bascule.runtime.cli.app import main

__all__ = ["main"]
