"""Built-in algorithms: credit assignment on the one training loop."""

from bascule.plugins.algorithms.best_of_n import BestOfN, BestOfN1
from bascule.plugins.algorithms.dpo import Dpo
from bascule.plugins.algorithms.entropic import Entropic
from bascule.plugins.algorithms.grpo import Grpo, Grpo1
from bascule.plugins.algorithms.ppo import Ppo
from bascule.plugins.algorithms.reinforce import Reinforce
from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry


@hookimpl
def bascule_register(registry: Registry) -> None:
    for algorithm in (BestOfN(), Dpo(), Entropic(), Grpo(), Ppo(), Reinforce()):
        registry.algorithm(algorithm)
    for earlier in (BestOfN1(), Grpo1()):
        registry.algorithm(earlier, earlier=True)
