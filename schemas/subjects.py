"""Subjects: ``bascule.<run>.<aggregate>.<aggregate id>.<event>``, and the identities that follow from them.

The subject *is* the identity of an event: its id is a hash of the subject, and what can happen once has exactly one
subject. Outcomes that exclude each other (promoted or rejected, published or failed) share one subject, so that the
broker itself refuses the second.
"""

from __future__ import annotations

import base64
import hashlib
import re

from bascule.schemas.errors import ConfigError

ROOT = "bascule"
_TOKEN = re.compile(r"[a-z0-9_-]{1,64}")
_EVENT = re.compile(rf"{ROOT}(\.{_TOKEN.pattern}){{4}}")
_BASE32, _DIGITS = b"abcdefghijklmnopqrstuvwxyz234567", b"0123456789abcdefghijklmnopqrstuv"
_TO_DIGITS = bytes(_DIGITS[_BASE32.index(c)] if c in _BASE32 else ord("!") for c in range(256))


def token(value: str) -> str:
    """Return ``value`` if it is one subject token, ``[a-z0-9_-]{1,64}``.

    Raises:
        ConfigError: naming the value, since a dot or a wildcard would address other subjects.
    """
    if not _TOKEN.fullmatch(value):
        raise ConfigError(
            f"{value!r} cannot be part of a subject.",
            next_step="Use 1 to 64 of: lower-case letters, digits, '-' and '_'.",
        )
    return value


def subject(run: str, aggregate: str, aggregate_id: str, event: str) -> str:
    """Build a five-token subject, each token validated."""
    return ".".join((ROOT, token(run), token(aggregate), token(aggregate_id), token(event)))


def is_event_subject(value: str) -> bool:
    """Whether ``value`` is the subject of an event: five tokens, the first of them ``bascule``."""
    return _EVENT.fullmatch(value) is not None


def event_id(subject_: str) -> str:
    """The identity of the event under ``subject_``: base32 of blake2b-160."""
    return base64.b32encode(_hash(subject_)).decode().lower()


def is_event_id(value: str, subject_: str) -> bool:
    """Whether ``value`` is the identity of the event under ``subject_``.

    Every event that is read is asked, so this goes without base64, which is written in Python.
    """
    try:
        return id_digest(value) == _hash(subject_)
    except ValueError:
        return False


def id_digest(value: str) -> bytes:
    """The 20 bytes that an identity stands for.

    Raises:
        ValueError: it is no identity.
    """
    if len(value) != 32:
        raise ValueError(f"{value!r} is not an identity")
    return int(value.encode().translate(_TO_DIGITS), 32).to_bytes(20, "big")


def _hash(subject_: str) -> bytes:
    return hashlib.blake2b(subject_.encode(), digest_size=20).digest()


def run_started(run: str) -> str:
    return subject(run, "run", "run", "started")


def run_end(run: str) -> str:
    """Shared by RunCompleted, RunFailed and RunCancelled."""
    return subject(run, "run", "run", "end")


def run_paused(run: str, ordinal: int) -> str:
    return subject(run, "run", f"pause-{ordinal:03d}", "paused")


def run_resumed(run: str, ordinal: int) -> str:
    return subject(run, "run", f"pause-{ordinal:03d}", "resumed")


def harness_outcome(run: str, generation: int) -> str:
    """Shared by HarnessProposed and AuthorFailed."""
    return subject(run, "harness", f"g{generation:02d}", "outcome")


def candidate_proposed(run: str, generation: int) -> str:
    return subject(run, "candidate", f"g{generation:02d}", "proposed")


def candidate_gate(run: str, generation: int) -> str:
    """Shared by CandidatePromoted and CandidateRejected."""
    return subject(run, "candidate", f"g{generation:02d}", "gate")


def episodes_requested(run: str, evaluation: str, shard: int) -> str:
    return subject(run, "episodes", f"{evaluation}-s{shard:02d}", "requested")


def evaluation_completed(run: str, evaluation: str) -> str:
    return subject(run, "eval", evaluation, "completed")


def trajectory_id(evaluation: str, position: int, sample: int) -> str:
    return f"{evaluation}-{position:04d}-n{sample}"


def trajectory_logged(run: str, trajectory: str) -> str:
    return subject(run, "traj", trajectory, "logged")


def trajectory_scored(run: str, trajectory: str) -> str:
    return subject(run, "traj", trajectory, "scored")


def lever_chosen(run: str, generation: int) -> str:
    return subject(run, "decision", f"g{generation:02d}", "lever")


def call_outcome(run: str, session: str, ordinal: int) -> str:
    """A model or tool call of a step machine (policy or author)."""
    return subject(run, "call", f"{session}-{ordinal:03d}", "outcome")


def train_aggregate(run: str, generation: int) -> str:
    """The filter that fences a training job: only the newest attempt may append under it."""
    return f"{ROOT}.{token(run)}.train.g{generation:02d}.>"


def train_requested(run: str, generation: int) -> str:
    return subject(run, "train", f"g{generation:02d}", "requested")


def train_started(run: str, generation: int, attempt: int) -> str:
    return subject(run, "train", f"g{generation:02d}", f"started-{attempt:03d}")


def adapter_checkpointed(run: str, generation: int, iteration: int) -> str:
    return subject(run, "train", f"g{generation:02d}", f"checkpointed-i{iteration:03d}")


def train_outcome(run: str, generation: int) -> str:
    """Shared by AdapterPublished and TrainFailed."""
    return subject(run, "train", f"g{generation:02d}", "outcome")


def adapter_served(run: str, adapter: str) -> str:
    return subject(run, "adapter", adapter, "served")


def run_rolled_back(run: str, ordinal: int) -> str:
    return subject(run, "run", f"rollback-{ordinal:03d}", "rolled_back")


def sandbox_probed(run: str, service: str, worker: str) -> str:
    return subject(run, "sandbox", f"{service}-{worker}", "probed")


def ablation_requested(run: str, name: str) -> str:
    return subject(run, "ablation", name, "requested")


def run_forked(run: str, ordinal: int) -> str:
    return subject(run, "run", f"fork-{ordinal:03d}", "forked")


def runtime_changed(run: str, ordinal: int) -> str:
    return subject(run, "run", f"runtime-{ordinal:03d}", "changed")


def log_checkpointed(run: str, count: int) -> str:
    return subject(run, "log", f"at-{count:09d}", "checkpointed")


def log_aggregate(run: str) -> str:
    """The filter that fences the notary: one checkpoint at a time."""
    return f"{ROOT}.{token(run)}.log.>"


def blob_erased(run: str, sha256: str) -> str:
    return subject(run, "blob", sha256, "erased")
