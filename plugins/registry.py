"""What plugins register, by kind and name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from bascule.plugins.algorithm import Algorithm
from bascule.plugins.engine import EngineFactory
from bascule.plugins.policy import Author, Policy
from bascule.plugins.redactor import Redactor
from bascule.plugins.task import TaskFactory, VerifierFactory
from bascule.schemas.errors import ConfigError, PluginError

T = TypeVar("T")


class NameTaken(PluginError):
    """Two plugins claim one name."""

    code = "bascule.plugin.name_taken"


def _check_text(kind: str, name: object, version: object) -> None:
    # Names are sorted and recorded with all others: one that is no text would break every list.
    if not (isinstance(name, str) and name and isinstance(version, str)):
        raise PluginError(f"it registers the {kind} {name!r} in version {version!r}; both must be text.")


class Kind(Generic[T]):
    """The registered objects of one kind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: dict[str, T] = {}
        self.owners: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.earlier: dict[tuple[str, str], T] = {}
        self.families: dict[str, Callable[[str], T]] = {}

    def add(self, name: str, item: T, *, owner: str, version: str, earlier: bool = False) -> None:
        """Register ``item``.

        Args:
            earlier: it decides for the runs that are pinned to this version of it, and for no new one.

        Raises:
            NameTaken: names both owners.
            PluginError: name or version is no text.
        """
        _check_text(self.name, name, version)
        if earlier:
            self.earlier[name, version] = item
            return
        if name in self.items:
            raise NameTaken(
                f"Two plugins register the {self.name} {name!r}: {self.owners[name]} and {owner}.",
                next_step="Uninstall one of them, or block it with BASCULE_PLUGINS.",
            )
        self.items[name] = item
        self.owners[name] = owner
        self.versions[name] = version

    def add_family(self, prefix: str, make: Callable[[str], T], *, owner: str, version: str) -> None:
        """Register all names ``prefix:rest`` at once; ``make`` gets the rest. Owned and pinned as ``prefix:``.

        Raises:
            NameTaken: names both owners.
            PluginError: prefix or version is no text.
        """
        _check_text(self.name, prefix, version)
        name = f"{prefix}:"
        if name in self.families:
            raise NameTaken(
                f"Two plugins register the {self.name} family {name!r}: {self.owners[name]} and {owner}.",
                next_step="Uninstall one of them, or block it with BASCULE_PLUGINS.",
            )
        self.families[name] = make
        self.owners[name] = owner
        self.versions[name] = version

    def base(self, name: str) -> str:
        """What ``name`` is registered as: itself, or the family ``prefix:`` that it belongs to."""
        family = name[: name.find(":") + 1]
        return family if name not in self.items and family in self.families else name

    def get(self, name: str, version: str | None = None) -> T:
        """Look up by name: that version where it is kept, else the present one.

        Raises:
            ConfigError: unknown; lists what there is.
        """
        if version is not None and (name, version) in self.earlier:
            return self.earlier[name, version]
        family = self.families.get(self.base(name))
        if family is not None:
            return family(name.partition(":")[2])
        try:
            return self.items[name]
        except KeyError:
            known = ", ".join(sorted([*self.items, *(f"{prefix}<name>" for prefix in self.families)])) or "none"
            raise ConfigError(f"There is no {self.name} {name!r}.", next_step=f"Known: {known}.") from None


class Registry:
    """Collects what plugins register. The loader sets ``owner`` while a plugin's hook runs."""

    def __init__(self) -> None:
        self.owner = "bascule"
        self.algorithms: Kind[Algorithm] = Kind("algorithm")
        self.tasks: Kind[TaskFactory] = Kind("task")
        self.verifiers: Kind[VerifierFactory] = Kind("verifier")
        self.policies: Kind[Callable[[dict[str, Any]], Policy]] = Kind("policy")
        self.authors: Kind[Callable[[dict[str, Any]], Author]] = Kind("author")
        self.engines: Kind[EngineFactory] = Kind("engine")
        self.redactors: Kind[Redactor] = Kind("redactor")

    @property
    def kinds(self) -> tuple[Kind[Any], ...]:
        return (self.algorithms, self.tasks, self.verifiers, self.policies, self.authors, self.engines, self.redactors)

    def algorithm(self, item: Algorithm, *, earlier: bool = False) -> None:
        self.algorithms.add(item.name, item, owner=self.owner, version=item.version, earlier=earlier)

    def task(self, name: str, factory: TaskFactory, *, version: str) -> None:
        self.tasks.add(name, factory, owner=self.owner, version=version)

    def task_family(self, prefix: str, make: Callable[[str], TaskFactory], *, version: str) -> None:
        """All tasks ``prefix:name``; ``make`` gets the name, and must be light."""
        self.tasks.add_family(prefix, make, owner=self.owner, version=version)

    def verifier(self, name: str, factory: VerifierFactory, *, version: str) -> None:
        """A second verifier, to stand beside a task's own; it is made and asked in the scoring process."""
        self.verifiers.add(name, factory, owner=self.owner, version=version)

    def policy(
        self, name: str, factory: Callable[[dict[str, Any]], Policy], *, version: str, earlier: bool = False
    ) -> None:
        self.policies.add(name, factory, owner=self.owner, version=version, earlier=earlier)

    def author(
        self, name: str, factory: Callable[[dict[str, Any]], Author], *, version: str, earlier: bool = False
    ) -> None:
        self.authors.add(name, factory, owner=self.owner, version=version, earlier=earlier)

    def engine(self, name: str, factory: EngineFactory, *, version: str) -> None:
        self.engines.add(name, factory, owner=self.owner, version=version)

    def redactor(self, item: Redactor) -> None:
        self.redactors.add(item.name, item, owner=self.owner, version=item.version)
