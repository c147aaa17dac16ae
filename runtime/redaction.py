"""Applies the registered redactors to texts, to whole values, and to what a run records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, TypeVar, get_origin

import msgspec

from bascule.plugins.loader import plugins
from bascule.plugins.redactor import Redactor
from bascule.plugins.redactors.secrets import Secrets
from bascule.plugins.registry import Registry
from bascule.schemas import subjects
from bascule.schemas.codec import encode
from bascule.schemas.envelope import Draft, Origin, Producer
from bascule.schemas.errors import PluginError

T = TypeVar("T")


class Redaction:
    """The redactors of a process, applied in the order of their names. A value that nothing is in comes back itself."""

    def __init__(self, redactors: Iterable[Redactor]) -> None:
        self._redactors = sorted(redactors, key=lambda r: r.name)
        quick = [getattr(r, "suspects", None) for r in self._redactors]
        self._suspects: list[Callable[[bytes], bool]] | None = None if None in quick else [q for q in quick if q]

    @classmethod
    def of(cls, registry: Registry) -> Redaction:
        """What plugins registered. The built-in ``secrets`` is among them unless a plugin registers that name itself:
        an allow-list of plugins that forgets it must not switch redaction off.
        """
        return cls({"secrets": Secrets(), **registry.redactors.items}.values())

    def encoded(self, draft: Draft, *, run: str, producer: Producer, origin: Origin = "live") -> bytes:
        """The payload of an event that is recorded now, without secrets.

        Raises:
            PluginError: a redactor failed.
            SchemaError: the event cannot be encoded, or is too large.
        """
        start = subjects.run_started(run)
        return encode(
            msgspec.structs.replace(draft, data=self.value(draft.data)),
            run=run,
            producer=producer,
            time=datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            root=None if draft.subject == start else subjects.event_id(start),
            origin=origin,
        )

    def text(self, text: str, key: str | None = None) -> str:
        """One text, standing under ``key``.

        Raises:
            PluginError: a redactor failed. What it said is kept back, since it may quote the text.
        """
        for redactor in self._redactors:
            try:
                text = redactor.redact(text, key)
                problem = None if isinstance(text, str) else f"gave {type(text).__name__}, not text"
            except Exception as e:
                problem = f"raised {type(e).__name__}"
            if problem is not None:
                raise PluginError(
                    f"The redactor {redactor.name} {redactor.version} {problem}; nothing was recorded.",
                    next_step="Repair or uninstall its plugin, then `bascule resume RUN`.",
                )
        return text

    def value(self, value: T) -> T:
        """A struct, or plain containers of such, without secrets; names of mappings and fields are the keys.

        Bytes (token ids, log-probabilities) and fields that allow named words only are left alone.

        Raises:
            PluginError: a redactor failed, or what it left does not fit the struct.
        """
        if self._suspects is not None:
            payload = msgspec.json.encode(value, enc_hook=repr)
            if not any(suspects(payload) for suspects in self._suspects):
                return value
        clean: T = self._walk(value, None)
        if clean is not value and isinstance(clean, msgspec.Struct):
            try:
                msgspec.json.decode(msgspec.json.encode(clean), type=type(clean))
            except (msgspec.DecodeError, UnicodeError) as e:
                raise PluginError(
                    f"What the redactors left of {type(clean).__name__} does not fit: {e}.",
                    next_step="An environment variable that looks secret may hold a common word: unset or rename it.",
                ) from None
        return clean

    def _walk(self, value: Any, key: str | None) -> Any:
        if isinstance(value, str):
            return self.text(value, key)
        if isinstance(value, msgspec.Struct):
            old = {name: getattr(value, name) for name in _open_fields(type(value))}
            new = {name: self._walk(v, name) for name, v in old.items()}
            changed = {name: v for name, v in new.items() if v is not old[name]}
            return msgspec.structs.replace(value, **changed) if changed else value
        if isinstance(value, Mapping):
            pairs = {self._walk(k, None): self._walk(v, k if isinstance(k, str) else None) for k, v in value.items()}
            same = len(pairs) == len(value) and all(value.get(k) is v for k, v in pairs.items())
            return value if same else pairs
        if isinstance(value, list | tuple):
            items = [self._walk(v, key) for v in value]
            same = all(a is b for a, b in zip(items, value, strict=True))
            return value if same else type(value)(items)
        return value


@cache
def _open_fields(type_: type[msgspec.Struct]) -> tuple[str, ...]:
    """Names of the fields that may hold any text."""
    fields = msgspec.structs.fields(type_)
    return tuple(f.name for f in fields if f.type is not bytes and get_origin(f.type) is not Literal)


@cache
def process_redaction() -> Redaction:
    """The process's own, of its installed plugins."""
    return Redaction.of(plugins().registry)


def redact_log(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor, to stand between what renders exceptions and what renders the line."""
    try:
        clean: MutableMapping[str, Any] = process_redaction().value(msgspec.to_builtins(event, enc_hook=repr))
    except PluginError as e:
        return {"event": "log.withheld", "reason": str(e)}
    return clean


def redact_message(text: str) -> str:
    """What a command tells a person. A plugin that fails is no reason to tell nothing, or to tell a secret."""
    try:
        return process_redaction().text(text)
    except PluginError as e:
        return f"What happened is kept back, since it may hold a secret. {Redaction([Secrets()]).text(str(e))}"
