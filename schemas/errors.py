"""The one exception tree. Every class has a stable ``code``; every message names the object and the next step."""

from __future__ import annotations

from collections.abc import Mapping


class BasculeError(Exception):
    """A failure that a person can act on.

    Args:
        message: what happened, and to which object.
        next_step: what to do about it; shown after the message.
    """

    code = "bascule.error"

    def __init__(self, message: str, *, next_step: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return self.message if self.next_step is None else f"{self.message} {self.next_step}"


class ConfigError(BasculeError):
    """A value given by the user is unknown or out of range."""

    code = "bascule.config"


class NotFound(BasculeError):
    """A run, event, file or model that was named does not exist."""

    code = "bascule.not_found"


class SchemaError(BasculeError):
    """A recorded payload cannot be decoded by this version."""

    code = "bascule.schema"


class LogError(BasculeError):
    """The event log refused or could not do something."""

    code = "bascule.log"


class Conflict(LogError):
    """An append met a different event under the same identity, or a newer attempt."""

    code = "bascule.log.conflict"


class LogUnavailable(LogError):
    """The log could not be reached before the deadline."""

    code = "bascule.log.unavailable"


class Corrupt(LogError):
    """Stored bytes do not match their hash, or the order of events is broken."""

    code = "bascule.log.corrupt"


class NotPermitted(LogError):
    """The server refuses this user; the message holds the server's own words."""

    code = "bascule.log.not_permitted"


class Erased(NotFound):
    """The blob was deleted on request; the log says when and why."""

    code = "bascule.erased"


class PluginError(BasculeError):
    """A plugin is missing, broken or ambiguous."""

    code = "bascule.plugin"


class HarnessError(BasculeError):
    """A harness directory or manifest is not usable."""

    code = "bascule.harness"


class EngineError(BasculeError):
    """An inference engine could not start or answer."""

    code = "bascule.engine"


class PromptError(EngineError):
    """The prompt itself is to blame: too long, or refused by the chat template. The harness is told."""

    code = "bascule.engine.prompt"


class ModelError(BasculeError):
    """A model behind an endpoint could not be asked, or gave nothing that can be used. The run is paused with this."""

    code = "bascule.model"


class TrainError(BasculeError):
    """A training request cannot be carried out.

    Attributes:
        figures: what it was judged by, by name.
    """

    code = "bascule.train"

    def __init__(
        self, message: str, *, next_step: str | None = None, figures: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.figures = dict(figures or {})


class OutOfStep(BasculeError):
    """One of several processes that train together ended or failed by itself, so that none can go on."""

    code = "bascule.out_of_step"


class ScoringError(BasculeError):
    """The scoring process could not score."""

    code = "bascule.scoring"
