"""Built-in policies: who chooses the lever and the algorithm."""

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.policies import rules
from bascule.plugins.registry import Registry


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.policy("rules", rules.make, version=rules.VERSION)
