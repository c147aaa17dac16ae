"""Built-in inference engines. Model libraries are imported when an engine is made, not here."""

from typing import Any

from bascule.plugins.engine import Engine
from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry


def _transformers(model: str, params: dict[str, Any]) -> Engine:
    from bascule.runtime.engines.transformers import make

    return make(model, params)


def _cassette(model: str, params: dict[str, Any]) -> Engine:
    from bascule.runtime.engines.cassette import make

    return make(model, params)


def _constant(model: str, params: dict[str, Any]) -> Engine:
    from bascule.runtime.engines.constant import make

    return make(model, params)


def _vllm(model: str, params: dict[str, Any]) -> Engine:
    from bascule.runtime.engines.vllm import make

    return make(model, params)


def _openai(model: str, params: dict[str, Any]) -> Engine:
    from bascule.runtime.engines.openai import make

    return make(model, params)


def _anthropic(model: str, params: dict[str, Any]) -> Engine:
    from bascule.runtime.engines.anthropic import make

    return make(model, params)


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.engine("transformers", _transformers, version="1")
    registry.engine("vllm", _vllm, version="1")
    registry.engine("openai", _openai, version="1")
    registry.engine("anthropic", _anthropic, version="1")
    registry.engine("cassette", _cassette, version="1")
    registry.engine("constant", _constant, version="1")
