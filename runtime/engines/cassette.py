"""An engine that replays recorded answers, keyed by trajectory and call.

A cassette is a file of TrajectoryLogged events, one payload a line, as ``bascule log RUN --type trajectory.logged
--json`` prints them. Real batched sampling is not bit-equal across batch shapes; recorded answers are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.engine import Engine, EngineInfo, Sampled, SampleRequest, asked
from bascule.schemas.codec import decode
from bascule.schemas.errors import BasculeError, ConfigError, EngineError, PromptError
from bascule.schemas.events import TrajectoryLogged
from bascule.schemas.trajectory import REFUSED, ModelCall, Note, unpack_ids


class CassetteEngine:
    """Answers from a recording; refuses what the recording does not hold, or holds for another question."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls: dict[tuple[str, int], ModelCall | Note] = {}
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                digest.update(line)
                self._calls |= self._read(number, line.rstrip(b"\n"))
        self._digest = digest.hexdigest()

    def _read(self, number: int, payload: bytes) -> dict[tuple[str, int], ModelCall | Note]:
        try:
            data = decode(number, msgspec.json.decode(payload, type=_Subject).subject, payload).data
            if not isinstance(data, TrajectoryLogged):
                return {}
            if data.body is None:
                raise ValueError("its trajectory is in a blob, and only those up to 64 KiB can be replayed")
            calls = [s for s in data.body.steps if isinstance(s, ModelCall) or (isinstance(s, Note) and s.refused)]
            for prompt in (call.prompt_ids for call in calls if isinstance(call, ModelCall)):
                unpack_ids(prompt)
        except (msgspec.DecodeError, BasculeError, ValueError, RecursionError) as e:
            reason = e.message if isinstance(e, BasculeError) else str(e)
            raise ConfigError(
                f"Line {number} of the cassette {self._path} is not usable: {reason.rstrip('.')}.",
                next_step="Record it again.",
            ) from e
        return {(data.trajectory, i): c for i, c in enumerate(calls)}

    async def start(self) -> EngineInfo:
        return EngineInfo(name="cassette", model=str(self._path), model_digest="", versions={"cassette": self._digest})

    async def close(self) -> None:
        pass

    async def load_adapter(self, name: str, folder: Path) -> None:
        del name, folder

    async def unload_adapter(self, name: str) -> None:
        del name

    async def sample(self, request: SampleRequest) -> Sampled:
        call = self._calls.get((request.trajectory, request.call))
        if call is None:
            raise EngineError(
                f"The cassette {self._path} holds no answer for call {request.call} of {request.trajectory}.",
                next_step="Record a run with the same configuration.",
            )
        if (call.refused if isinstance(call, Note) else call.asked) != asked(request):
            raise EngineError(
                f"The cassette {self._path} holds another question under call {request.call} of {request.trajectory}.",
                next_step="Record a run with the same configuration.",
            )
        if isinstance(call, Note):
            raise PromptError(call.text.removeprefix(REFUSED))
        return Sampled(prompt_ids=tuple(unpack_ids(call.prompt_ids)), outputs=call.outputs, usage=call.usage)


class _Subject(msgspec.Struct):
    subject: str


def make(model: str, params: dict[str, Any]) -> Engine:
    """``params["path"]`` is the recording.

    Raises:
        ConfigError: there is no such file.
    """
    del model
    path = Path(str(params.get("path", "")))
    if not path.is_file():
        raise ConfigError(f"There is no cassette {str(path)!r}.", next_step="Set engine.params.path to a recording.")
    return CassetteEngine(path)
