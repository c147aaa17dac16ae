"""Built-in algorithms: credit assignment on the one training loop."""

from bascule.plugins.algorithms.best_of_n import BestOfN
from bascule.plugins.algorithms.grpo import Grpo
from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.algorithm(Grpo())
    registry.algorithm(BestOfN())
