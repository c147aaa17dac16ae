"""The broker: answers a harness's calls, keeps it within its manifest, and records the trajectory.

The runtime, not the harness, records what was asked and answered. Whatever a harness sends is data: its size is checked
before it is read, its form before it is used.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import structs

from bascule.plugins.engine import Engine, Message, SampleRequest, asked
from bascule.plugins.task import Tool
from bascule.runtime.episodes.batch import Batch
from bascule.runtime.episodes.confinement import INODES
from bascule.runtime.episodes.episode import Limits, Outcome, StopEpisode, cpu_seconds
from bascule.runtime.episodes.host import EpisodeProcessError
from bascule.runtime.episodes.pool import HarnessPool
from bascule.runtime.redaction import Redaction, process_redaction
from bascule.schemas.errors import BasculeError, PromptError
from bascule.schemas.harness import Harness, HarnessManifest
from bascule.schemas.trajectory import (
    REFUSED,
    EpisodeError,
    ModelCall,
    Note,
    Sampling,
    Step,
    ToolCall,
    Trajectory,
    pack_ids,
)

ErrorKind = Literal["crash", "timeout", "output-limit", "call-limit", "protocol", "no-answer", "engine"]

OVERALL_SECONDS = 3600.0
MAX_ANSWER = 16 * 1024
MAX_NOTES = 1000
MAX_TOKENS_FACTOR = 4
_MESSAGE = 2000
_LINES = 12
_KILLED = "process that starts episodes was killed, twice"

Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class EpisodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One episode to run.

    Attributes:
        trajectory: its id, ``<evaluation>-<position>-n<sample>``.
        harness: whose ``harness.py`` runs.
        example: what the harness sees of the task's item; never the answer.
        sampling: the default of its model calls.
        seed: seeds the calls and the harness's own randomness.
        adapter: name of a loaded adapter, None for the base model.
        forced_temperature: the harness may not choose another temperature (training, reward landscapes).
        max_tokens: the most tokens that one sample may be asked to have; by default four times ``sampling.max_tokens``.
        batch: with whom the episode shares what ``prepare`` made; None for a harness whose episodes share nothing.
    """

    trajectory: str
    harness: Harness
    example: dict[str, Any]
    sampling: Sampling
    seed: int
    adapter: str | None = None
    forced_temperature: bool = False
    max_tokens: int | None = None
    batch: Batch | None = None


class _Sample(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    n: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stop: Annotated[tuple[Stop, ...], msgspec.Meta(max_length=16)] = ()
    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] | None = None


class _Chat(_Sample, frozen=True, kw_only=True, tag="chat"):
    messages: Annotated[tuple[Message, ...], msgspec.Meta(min_length=1)]


class _Complete(_Sample, frozen=True, kw_only=True, tag="complete"):
    prompt: str


class _Tool(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="tool", forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(max_length=256)]
    arguments: dict[str, Any] = {}


class _Note(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="note", forbid_unknown_fields=True):
    text: str


class _Answer(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="answer", forbid_unknown_fields=True):
    answer: str | None
    type: str = ""


_Request = _Chat | _Complete | _Tool | _Note | _Answer
_REQUEST = msgspec.json.Decoder(_Request)


def call_seed(seed: int, call: int) -> int:
    """Seed of the ``call``-th model call of an episode: 48 bits of a hash, so that it is exact in every JSON reader."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{call}".encode()).digest()[:6], "big")


MakeTools = Callable[[], Mapping[str, Tool]]
"""Makes the tools of an episode; those that have a state begin it anew."""


async def run_episode(
    spec: EpisodeSpec, engine: Engine, pool: HarnessPool, tools: MakeTools, redaction: Redaction | None = None
) -> Trajectory:
    """Run one episode to its end; whatever the harness does, the result is a trajectory.

    What the harness says and what it is told is redacted before the model or the harness sees it, so that neither the
    recorded texts nor the recorded token ids hold a secret: by ``redaction``, else by the process's own redactors.
    Tools get their arguments as the harness gave them.

    An episode that is lost with the zygote is played once more from the start, under a zygote of its own, since
    another episode may be to blame. ``tools`` is called for each start.
    """
    limits = limits_of(spec.harness.manifest)
    redaction = redaction or process_redaction()
    for alone in (False, True):
        broker = _Broker(spec, engine, tools(), redaction)
        try:
            outcome = await pool.run(
                spec.harness, broker.opening(), broker.handle, limits=limits, batch=spec.batch, alone=alone
            )
        except EpisodeProcessError as e:
            return broker.trajectory(EpisodeError(kind="engine", message=str(e)))
        if outcome.ending != "lost":
            break
    return broker.trajectory(_error(structs.replace(outcome, output=redaction.value(outcome.output)), limits))


def limits_of(manifest: HarnessManifest) -> Limits:
    """What a manifest leaves to one episode."""
    return Limits(
        seconds=manifest.timeout_seconds,
        overall_seconds=OVERALL_SECONDS + manifest.timeout_seconds,
        output_bytes=manifest.max_output_bytes,
        memory_bytes=manifest.memory_mb << 20,
        disk_bytes=manifest.disk_mb << 20,
        processes=manifest.processes,
        prepare_seconds=manifest.prepare_seconds,
    )


class _Broker:
    def __init__(self, spec: EpisodeSpec, engine: Engine, tools: Mapping[str, Tool], redaction: Redaction) -> None:
        self._spec = spec
        self._engine = engine
        self._redaction = redaction
        self._manifest = spec.harness.manifest
        self._tools = {name: tools[name] for name in self._manifest.tools if name in tools}
        self._steps: list[Step] = []
        self._answer: str | None = None
        self._error: EpisodeError | None = None
        self._calls = 0
        self._samples = 0
        self._tool_calls = 0
        self._notes = 0

    def opening(self) -> bytes:
        """The first frame of the episode."""
        return msgspec.json.encode(
            {"example": self._spec.example, "seed": self._spec.seed, "tools": tuple(self._tools)}
        )

    def trajectory(self, ending: EpisodeError) -> Trajectory:
        """What was recorded. ``ending`` is the process's own, for an episode that did not end by a frame."""
        if self._answer is not None:
            return Trajectory(steps=tuple(self._steps), answer=self._answer)
        return Trajectory(steps=tuple(self._steps), error=self._error or ending)

    async def handle(self, frame: bytes) -> bytes | None:
        """Answer one frame.

        Raises:
            StopEpisode: it was the last one.
        """
        try:
            request: _Request = _REQUEST.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            raise self._stop("protocol", f"A request of the harness is not valid: {e}.") from None
        match request:
            case _Chat() | _Complete():
                return await self._sample(self._redaction.value(request))
            case _Tool():
                return await self._call(request)
            case _Note():
                self._notes += 1
                if self._notes > MAX_NOTES:
                    raise self._stop("output-limit", f"The harness made more than {MAX_NOTES} notes.")
                self._steps.append(Note(text=self._redaction.value(request.text)))
                return None
            case _Answer():
                raise self._finish(request)

    def _stop(self, kind: ErrorKind, message: str) -> StopEpisode:
        self._error = EpisodeError(kind=kind, message=self._redaction.value(message)[:_MESSAGE])
        return StopEpisode()

    def _finish(self, request: _Answer) -> StopEpisode:
        if request.answer is None:
            return self._stop("no-answer", f"solve returned {request.type[:100] or 'None'}, not a string.")
        size = len(request.answer.encode())
        if size > MAX_ANSWER:
            return self._stop("output-limit", f"The answer is {size} bytes; the limit is {MAX_ANSWER}.")
        self._answer = self._redaction.value(request.answer)
        return StopEpisode()

    async def _sample(self, request: _Chat | _Complete) -> bytes:
        self._samples += request.n
        if self._samples > self._manifest.max_model_calls:
            limit = self._manifest.max_model_calls
            raise self._stop("call-limit", f"The harness asked for {self._samples} samples; the limit is {limit}.")
        call, self._calls = self._calls, self._calls + 1
        sample = SampleRequest(
            trajectory=self._spec.trajectory,
            call=call,
            prompt=request.messages if isinstance(request, _Chat) else request.prompt,
            n=request.n,
            sampling=self._sampling(request),
            seed=call_seed(self._spec.seed, call),
            adapter=self._spec.adapter,
        )
        try:
            sampled = await self._engine.sample(sample)
        except Exception as e:
            reason = self._reason(e)
            if isinstance(e, PromptError):
                self._steps.append(Note(text=f"{REFUSED}{reason}", refused=asked(sample)))
                return msgspec.json.encode({"error": reason})
            raise self._stop("engine", reason) from None
        # The harness is told what is recorded, so that a recording can answer in the engine's place.
        outputs = self._redaction.value(sampled.outputs)
        if len(outputs) != sample.n:
            raise self._stop("engine", f"The engine gave {len(outputs)} outputs for {sample.n}.")
        self._steps.append(
            ModelCall(
                kind="chat" if isinstance(request, _Chat) else "completion",
                asked=asked(sample),
                prompt_ids=pack_ids(sampled.prompt_ids),
                outputs=outputs,
                sampling=sample.sampling,
                seed=sample.seed,
                adapter=sample.adapter,
                usage=None if sampled.prompt_ids else sampled.usage,
            )
        )
        return msgspec.json.encode({"result": [(output.text, output.finish_reason) for output in outputs]})

    def _sampling(self, request: _Chat | _Complete) -> Sampling:
        default = self._spec.sampling
        most = self._spec.max_tokens or MAX_TOKENS_FACTOR * default.max_tokens
        chosen = None if self._spec.forced_temperature else request.temperature
        return Sampling(
            temperature=default.temperature if chosen is None else chosen,
            max_tokens=min(request.max_tokens or default.max_tokens, most),
            stop=request.stop or default.stop,
        )

    async def _call(self, request: _Tool) -> bytes:
        self._tool_calls += 1
        limit = self._manifest.max_tool_calls
        if self._tool_calls > limit:
            raise self._stop("call-limit", f"The harness made more than {limit} tool calls.")
        result: str | None = None
        error: str | None = None
        tool = self._tools.get(request.name)
        if tool is None:
            error = f"There is no tool {request.name!r}; there is: {', '.join(self._tools) or 'none'}."
        else:
            try:
                result = await tool(request.arguments)
            except Exception as e:
                error = self._reason(e)
        result, error = self._redaction.value((result, error))
        arguments = msgspec.json.encode(self._redaction.value(request.arguments)).decode()
        recorded = None if result is None else msgspec.json.encode(result).decode()
        self._steps.append(
            ToolCall(name=self._redaction.value(request.name), arguments=arguments, result=recorded, error=error)
        )
        return msgspec.json.encode({"result": result} if error is None else {"error": error})

    def _reason(self, e: Exception) -> str:
        # Redacted before it is cut: half a key is no longer known as one.
        text = self._redaction.value(str(e))[:_MESSAGE]
        return text if isinstance(e, BasculeError) and text else f"{type(e).__name__}: {text}"


def _error(outcome: Outcome, limits: Limits) -> EpisodeError:
    """What a process's ending means for its episode."""
    code = outcome.exit_code
    preparing = outcome.during == "prepare"
    who = {"solve": "The harness", "prepare": "The harness's prepare", "batch": "The harness's batch"}[outcome.during]
    allowed = limits.prepare_seconds if preparing else limits.seconds
    match outcome.ending:
        case "timeout":
            message = f"{who} ran for {outcome.seconds:.1f} s; the limit is {allowed:g} s."
            return EpisodeError(kind="timeout", message=message)
        case "output-limit":
            return EpisodeError(kind="output-limit", message=f"{who} sent more than {limits.output_bytes} bytes.")
        case "memory":
            message = f"{who} used more than the {limits.memory_bytes >> 20} MiB of memory that its manifest names."
            return EpisodeError(kind="crash", message=message)
        case "processes":
            message = f"{who} had more than the {limits.processes} processes and threads that its manifest names."
            return EpisodeError(kind="crash", message=message)
        case "disk":
            message = (
                f"{who} filled more than the {limits.disk_bytes >> 20} MiB of disk that its manifest names, "
                f"or made more than {INODES} files."
            )
            return EpisodeError(kind="crash", message=message)
        case "overdue":
            # Its own time was not used up: it waited for answers of ours.
            message = (
                f"The episode was not over after {limits.overall_seconds:g} s, most of it spent waiting for answers."
            )
            return EpisodeError(kind="engine", message=message)
        case "unavailable":
            return EpisodeError(kind="engine", message=f"No process for the episode: {outcome.output}.")
        case "lost":
            what = "harness's batch was lost again and again" if outcome.during == "batch" else _KILLED
            return EpisodeError(kind="crash", message=f"The {what}.")
    if code == -signal.SIGXCPU:
        seconds = cpu_seconds(allowed)
        return EpisodeError(kind="timeout", message=f"{who} used {seconds} s of processor time.")
    how = f"was killed by {_signal_name(-code)}" if code and code < 0 else f"exited with status {code}"
    said = "\n".join(outcome.output.strip().splitlines()[-_LINES:])[-_MESSAGE:]
    message = f"{who} {how} before it {'was done' if preparing else 'answered'}" + (f":\n{said}" if said else ".")
    return EpisodeError(kind="crash", message=message)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
