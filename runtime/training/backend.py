"""What computes updates: torch, in this process or in several that were launched together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bascule.plugins.algorithm import Algorithm
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import RunStarted, TrainRequested

if TYPE_CHECKING:
    from bascule.trainers.jobs import Job

#: Among the versions of a start: how many processes computed, where they were several.
PROCESSES = "processes"


class OtherInstallation(ConfigError):
    """This machine lacks what the run computes with: a person has to put it back, and no job is to blame."""

    code = "bascule.config.other_installation"


class Backend(Protocol):
    """What computes updates."""

    def check(self, started: RunStarted) -> None:
        """Look for what the run computes with, before an attempt is recorded.

        Raises:
            OtherInstallation: it is not here.
        """
        ...

    def threads(self, wanted: int) -> int:
        """Set the compute threads of the calling thread, 0 for the default; how many there are."""
        ...

    def versions(self) -> dict[str, str]:
        """What computes, by name; the device; how many processes, if they are several."""
        ...

    def open(
        self,
        started: RunStarted,
        algorithm: Algorithm,
        request: TrainRequested,
        parent: Mapping[str, bytes] | None,
        state: bytes | None,
    ) -> Job:
        """A job on the run's base model that continues from ``parent``, and from ``state`` if it was under way."""
        ...


class TorchBackend:
    """Updates with torch, which is imported when they begin; by all processes where this is the first of several."""

    def check(self, started: RunStarted) -> None:
        _base_folder(started)

    def threads(self, wanted: int) -> int:
        import torch

        if wanted:
            torch.set_num_threads(wanted)
        return torch.get_num_threads()

    def versions(self) -> dict[str, str]:
        import torch

        from bascule.trainers.distributed import ranks

        cuda = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
        found = {name: version(name) for name in ("peft", "torch", "transformers")} | {"device": device}
        return found if ranks().size == 1 else found | {PROCESSES: str(ranks().size)}

    def open(
        self,
        started: RunStarted,
        algorithm: Algorithm,
        request: TrainRequested,
        parent: Mapping[str, bytes] | None,
        state: bytes | None,
    ) -> Job:
        from bascule.trainers.distributed import LedJob, ranks

        if ranks().size == 1:
            return _opened(lambda: algorithm, started, request, parent, state)
        return LedJob(
            lambda: _opened(lambda: algorithm, started, request, parent, state),
            (algorithm.name, algorithm.version, started, request, parent, state),
        )


def follow() -> None:
    """In a process that was launched beside the first: compute with it what it computes, until it is done.

    Raises:
        OutOfStep: a process ended by itself.
    """
    from bascule.trainers import distributed

    distributed.follow(lambda name, version, *more: _opened(lambda: _installed(name, version), *more))


def _installed(name: str, version: str) -> Algorithm:
    """The algorithm that the first process computes with.

    Raises:
        OtherInstallation: there is none, or only another version.
    """
    from bascule.plugins.loader import plugins

    try:
        found = plugins().registry.algorithms.get(name, version)
    except ConfigError as e:
        raise OtherInstallation(e.message, next_step=e.next_step) from e
    if found.version != version:
        raise OtherInstallation(
            f"One process computes with {name} {version}, another has {found.version}.",
            next_step="Install the same plugins on every machine of the launch.",
        )
    return found


def _opened(
    algorithm: Callable[[], Algorithm],
    started: RunStarted,
    request: TrainRequested,
    parent: Mapping[str, bytes] | None,
    state: bytes | None,
) -> Job:
    from bascule.trainers.distributed import in_step
    from bascule.trainers.jobs import open_job

    # In step before they open, since opening may be a thing of all processes together.
    found, folder = in_step(lambda: (algorithm(), _base_folder(started)))
    return open_job(found, folder, request.params, request.seed, parent, state)


def _base_folder(started: RunStarted) -> Path:
    """Of the run's base model.

    Raises:
        OtherInstallation: there is none, or it is another one.
    """
    from bascule.trainers.base_model import model_digest, resolve_model

    model = started.config.model
    try:
        folder = resolve_model(model)
    except ConfigError as e:
        raise OtherInstallation(e.message, next_step=e.next_step) from e
    digest = model_digest(folder)
    if started.model_digest not in ("", digest):
        raise OtherInstallation(
            f"The model {model!r} is not the one that the run started with (digest {digest}, recorded "
            f"{started.model_digest}).",
            next_step="Put the recorded model back; a run keeps its model.",
        )
    return folder
