"""The five services by name."""

from __future__ import annotations

from bascule.runtime.runner import Service
from bascule.runtime.services import calls, feedback, meta, rollout, trainer, verifier

SERVICES = {
    s.name: s
    for s in (
        Service(meta.NAME, meta.decide),
        Service(rollout.NAME, rollout.decide, rollout.Rollout),
        Service(verifier.NAME, verifier.decide, verifier.Verifier),
        Service(feedback.NAME, feedback.decide, calls.Feedback),
        Service(trainer.NAME, trainer.decide, trainer.Trainer),
    )
}
