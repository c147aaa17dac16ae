"""The plugin API: hooks, one protocol per kind, and the loader."""

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry

__all__ = ["Registry", "hookimpl"]
