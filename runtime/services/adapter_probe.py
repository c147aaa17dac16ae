"""Whether an engine serves an adapter's weights: what it says of a text, against what the trainer recorded.

Engines were seen that kept on serving an earlier adapter, or the base model, while training went on; nothing in their
answers shows it but the log-probabilities. The trainer records those of a fixed text at each checkpoint, so that no
second copy of the model is needed to compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bascule.plugins.engine import EngineInfo, Scoring
from bascule.schemas.errors import EngineError
from bascule.schemas.events import AdapterProbe, ServedProbe
from bascule.schemas.trajectory import unpack_floats, unpack_ids

#: How far a log-probability may be off, by the coarser type of both sides.
BOUNDS = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
#: What rounding moves log-probabilities by on average (root mean square), with a margin.
NOISE = {"float32": 2e-4, "float16": 0.01, "bfloat16": 0.06}
_COARSEST = "bfloat16"
#: Two sets of weights can be told apart where they differ by this many times the noise (Euclidean norms).
_APART = 8.0


class NotServed(EngineError):
    """An engine answers with other weights than an adapter's files hold."""

    code = "bascule.engine.not_served"


async def probe_served(
    engine: Scoring, info: EngineInfo, name: str, probe: AdapterProbe, others: Mapping[str, AdapterProbe]
) -> ServedProbe:
    """Ask an engine for the probe under a loaded adapter and compare; on all replicas.

    Args:
        name: under which it is loaded.
        probe: what the trainer recorded.
        others: of further adapters, by name: what a stale one would say.

    Raises:
        NotServed: a replica serves other weights.
        EngineError: a replica does not answer.
    """
    scores = await engine.score(name, unpack_ids(probe.ids))
    return compare(name, probe, scores, others, coarser(probe.dtype, info.versions.get("dtype", "")))


def coarser(one: str, other: str) -> str:
    """The type with the larger bound; one that is not known counts as the coarsest."""
    known = [t if t in BOUNDS else _COARSEST for t in (one, other)]
    return max(known, key=lambda t: BOUNDS[t])


def compare(
    name: str,
    probe: AdapterProbe,
    scores: Sequence[Sequence[float]],
    others: Mapping[str, AdapterProbe],
    dtype: str,
) -> ServedProbe:
    """Compare what replicas say of the probe with what the trainer does.

    A replica serves the adapter if no log-probability is off by more than rounding makes it, and if, of all weights
    that can be told apart from the adapter's, none fits better. The second finds a stale version that the training
    has moved by less than the bound: the sum over tokens tells more than the largest one.

    Raises:
        NotServed: one does not.
    """
    own, base = unpack_floats(probe.logprobs), unpack_floats(probe.base)
    bound = BOUNDS[dtype]
    known = {"the base model": base} | {
        f"the adapter {other!r}": unpack_floats(p.logprobs) for other, p in others.items() if p.ids == probe.ids
    }
    apart = {who: values for who, values in known.items() if _distance(values, own) > _APART * NOISE[dtype]}
    largest = 0.0
    for number, score in enumerate(scores, 1):
        which = f" by replica {number} of {len(scores)}" if len(scores) > 1 else ""
        if len(score) != len(own):
            raise NotServed(
                f"The probe of the adapter {name!r} has {len(own)} tokens; {len(score)} were scored{which}."
            )
        off = _largest(score, own)
        largest = max(largest, off)
        nearest = min(apart, key=lambda who: _distance(score, apart[who]), default=None)
        nearer = nearest is not None and _distance(score, apart[nearest]) < _distance(score, own)
        if nearer or not off <= bound:  # also where it is no number
            like = f"; they are nearer to those of {nearest}" if nearer else ""
            raise NotServed(
                f"The adapter {name!r} is not served as it was trained{which}: log-probabilities of {len(own)} tokens "
                f"are up to {off:.2g} off, where rounding in {dtype} allows {bound:g}{like}.",
                next_step="Restart the engine and see that it serves the base model that was trained; then "
                "`bascule resume RUN`. No episode ran with it.",
            )
    return ServedProbe(
        tokens=len(own), largest=largest, bound=bound, from_base=_largest(base, own), dtype=dtype, replicas=len(scores)
    )


def _largest(one: Sequence[float], other: Sequence[float]) -> float:
    return float("nan") if any(map(math.isnan, one)) else max(abs(a - b) for a, b in zip(one, other, strict=True))


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return float(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5)
