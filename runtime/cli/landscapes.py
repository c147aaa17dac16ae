"""A reward landscape in a few lines for people."""

from __future__ import annotations

from bascule.schemas.landscape import Interval, RewardLandscape, Spread

_BLOCKS = "▁▂▃▄▅▆▇█"


def landscape_lines(land: RewardLandscape, rollout: Spread | None) -> list[str]:
    """Shape and spread of the rewards, the fractions with their intervals, and what a rollout took.

    Args:
        rollout: seconds of one, if they were measured.
    """
    scored = land.samples - land.unscored
    lines = []
    if land.rewards is not None:
        low, high = land.rewards.edges[0], land.rewards.edges[-1]
        lines.append(
            f"rewards {bars(land.rewards.counts)} from {low:g} to {high:g} ({scored} samples): mean "
            f"{land.mean:.3f}{_span(land.mean_interval)}, skew {land.skew:.2f}"
        )
    fractions = [("success", land.success_rate, land.success_interval)]
    if land.density is not None:
        fractions.append(("rewards other than 0", land.density, land.density_interval))
    fractions.append((f"informative of {land.groups} groups", land.informative, land.informative_interval))
    if land.step_density is not None:
        of = f"samples with step rewards ({land.step_density:.2f} of {land.step_calls} are not 0)"
        fractions.append((of, land.step_rewards / max(scored, 1), land.step_interval))
    lines.append("; ".join(f"{name} {value:.3f}{_span(interval)}" for name, value, interval in fractions))
    took = []
    if land.tokens is not None:
        took.append(f"a rollout took {land.tokens.mean:.0f} tokens (95% at most {land.tokens.p95:.0f})")
    if rollout is not None:
        took.append(f"{rollout.mean:.3g} s (95% at most {rollout.p95:.3g})")
    if land.ess is not None:
        took.append(f"last update: effective samples {land.ess:.2f}")
    if land.kl_to_base is not None:
        took.append(f"KL to the base {land.kl_to_base:.3f} nats a token")
    if land.regression_drop is not None:
        took.append(f"drop on the regression set {land.regression_drop:.3f}")
    return [*lines, "; ".join(took)] if took else lines


def bars(counts: tuple[int, ...]) -> str:
    """A histogram as text: an eighth of a line or more for what is not 0, a dot for what is."""
    top = max(counts, default=0)
    return "".join(_BLOCKS[max(0, -(-c * 8 // top) - 1)] if c else "·" for c in counts)


def _span(found: Interval | None) -> str:
    return "" if found is None else f" [{found.low:.3f}, {found.high:.3f}]"
