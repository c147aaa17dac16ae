"""Built-in inference engines. Model libraries are imported when an engine is made, not here."""

from importlib import import_module
from typing import Any

from bascule.plugins.engine import Engine, EngineFactory
from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry


def _lazy(name: str) -> EngineFactory:
    """The ``make`` of a module here, which is imported when an engine is made."""

    def make(model: str, params: dict[str, Any]) -> Engine:
        engine: Engine = import_module(f"{__name__}.{name}").make(model, params)
        return engine

    return make


@hookimpl
def bascule_register(registry: Registry) -> None:
    for name in ("transformers", "vllm", "openai", "anthropic", "cassette", "constant"):
        registry.engine(name, _lazy(name), version="1")
