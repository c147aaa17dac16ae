"""Built-in redactors: what keeps secrets out of the log."""

from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.redactors.secrets import Secrets
from bascule.plugins.registry import Registry


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.redactor(Secrets())
