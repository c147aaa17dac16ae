"""Built-in policies: who chooses the lever and the algorithm."""

from functools import partial

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.policies import alternate, claude, fixed, rules
from bascule.plugins.registry import Registry


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.policy("rules", rules.make, version=rules.VERSION)
    registry.policy("rules", partial(rules.make, version="1"), version="1", earlier=True)
    registry.policy("rules", partial(rules.make, version="2"), version="2", earlier=True)
    registry.policy("fixed", fixed.make, version=fixed.VERSION)
    registry.policy("alternate", alternate.make, version=alternate.VERSION)
    registry.policy("claude", claude.make, version=claude.VERSION)
