"""The command line. Importing it is cheap: model libraries, the broker's client and plots load when a command needs them."""

from bascule.runtime.cli.app import main

__all__ = ["main"]
