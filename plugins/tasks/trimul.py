"""The triangle multiplicative update of AlphaFold 2 as a task: write a kernel that is faster than PyTorch's operations.

This is the CPU variant: one thread of one core, against a reference on the same core. Its figures are ratios, and
are not comparable with published microseconds on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from bascule.plugins.extras import install_command
from bascule.plugins.task import Allows, Baseline, Example, PublicFace, Tool
from bascule.plugins.tasks.splits import constant_baseline
from bascule.plugins.tasks.trimul_cases import SIZES, Case
from bascule.plugins.tasks.trimul_kernels import FUSED, NAIVE, REFERENCE, harness_files
from bascule.plugins.tasks.trimul_scorer import MAX_BYTES, TrimulPrivate, difference, vectors
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split

DESCRIPTION = f"""\
Write kernel.py: Python with torch that defines custom_kernel(data), the triangle multiplicative update (outgoing edges)
of AlphaFold 2, supplementary algorithm 11, forward only. The answer is its text, at most {MAX_BYTES // 1024} KiB.

data = (x, mask, weights, config): x [B, N, N, D] and mask [B, N, N] float32; config has "dim" (D) and "hidden_dim" (h,
128); weights has "norm.weight", "norm.bias" [D]; "left_proj.weight", "right_proj.weight", "left_gate.weight",
"right_gate.weight", "out_gate.weight" [h, D]; "to_out_norm.weight", "to_out_norm.bias" [h]; "to_out.weight" [D, h].

    x = layer_norm(x);  left = (x Wl) * mask * sigmoid(x Wlg);  right = (x Wr) * mask * sigmoid(x Wrg)
    out[b,i,j] = sum over k of left[b,i,k] * right[b,j,k];  result = (layer_norm(out) * sigmoid(x Wog)) Wo

Return a new contiguous float32 tensor [B, N, N, D] and leave the inputs as they are. Each element must be within
0.02 + 0.02 |reference| for any shape, mask and distribution of x (channels of x differ in scale and shift; normal or
Cauchy). Inputs are new at every call. It runs on one core with one thread, without further processes.

The reward is the time of the reference, written with torch's own operations, over the kernel's: 1 where the difference
is under 10% or under three times what the reference shows against itself, 0 where any output is wrong."""

VARIANTS = ("cpu",)
SCORE_MODES = ("strict",)


class Trimul:
    """The task ``trimul``.

    Parameters: ``variant`` (``cpu``), ``score_mode`` (``strict``), ``pairs`` (9, timed pairs of an
    example, over its cases; at least 3),
    ``size`` (``full``, or ``small`` for trying out) and ``seconds`` (120, the limit of a candidate's program).
    """

    name = "trimul"
    summary = "a CPU kernel of AlphaFold 2's triangle multiplicative update; scored by its speed-up over a reference"

    def __init__(self, params: dict[str, Any]) -> None:
        known = {"variant", "score_mode", "pairs", "size", "seconds"}
        unknown = sorted(set(params) - known)
        if unknown:
            raise _refused(f"has no parameter {unknown[0]!r}", f"It has {', '.join(sorted(known))}.")
        if params.get("variant", "cpu") not in VARIANTS:
            raise _refused(
                f"has no variant {params['variant']!r}", "Use cpu: a GPU variant is not part of this version."
            )
        if params.get("score_mode", "strict") not in SCORE_MODES:
            raise _refused(
                f"has no score_mode {params['score_mode']!r}",
                "Use strict: the published reward is a time on a GPU, which this variant has none of.",
            )
        self.size = params.get("size", "full")
        if self.size not in SIZES:
            raise _refused(f"has no size {self.size!r}", f"It has {' and '.join(SIZES)}.")
        self.pairs = params.get("pairs", 9)
        if isinstance(self.pairs, bool) or not isinstance(self.pairs, int) or not 3 <= self.pairs <= 99:
            raise _refused(f"cannot time {self.pairs!r} pairs", "Give an integer from 3 to 99.")
        self.seconds = params.get("seconds", 120)
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, int | float) or not 1 <= self.seconds <= 3600:
            raise _refused(f"cannot limit a program to {self.seconds!r} s", "Give 1 to 3600 seconds.")

    def cases(self) -> dict[tuple[Split, str], tuple[Case, ...]]:
        """The timed cases of each split and example."""
        return {
            (split, f"{split}-{i}"): cases
            for split, examples in SIZES[self.size].items()
            for i, cases in enumerate(examples)
        }

    def public(self) -> PublicFace:
        examples: dict[str, list[Example]] = {split: [] for split in SIZES[self.size]}
        for (split, name), cases in self.cases().items():
            question = "A kernel that is timed on " + ", ".join(c.name for c in cases) + "."
            examples[split].append(Example(id=name, group=name, input={"question": question}))
        return PublicFace(
            name=self.name,
            version="1",
            description=DESCRIPTION,
            train=tuple(examples["train"]),
            answers={e.id: REFERENCE for e in examples["train"]},
            dev=tuple(examples["dev"]),
            sealed=tuple(examples["sealed"]),
            max_answer_tokens=MAX_BYTES // 2,
            source="made by this task's code; the maths is Jumper et al. 2021, supplementary algorithm 11",
            licence="MIT",
            allows=Allows(packages=()),
            regime="cpu",
        )

    def private(self) -> TrimulPrivate:
        """The scorer; it needs torch.

        Raises:
            ConfigError: torch is not installed.
        """
        if importlib.util.find_spec("torch") is None:
            raise _refused("needs torch, which is not installed", f"Install it: {install_command('torch')}")
        # The scoring process gives up its rights once this is open, and may be unable to load a module later: what
        # numpy loads at a first use is loaded now.
        difference(vectors(Case(n=1, batch=1, dim=2)), bytes(16))
        return TrimulPrivate(
            self.cases(),
            pairs=self.pairs,
            seconds=self.seconds,
            triton=importlib.util.find_spec("triton") is not None,
        )

    def harness(self) -> dict[str, str]:
        return harness_files()

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """The reference against itself, row-by-row loops, and joined matrix products; each scored as any answer is."""
        return (
            constant_baseline("reference", public, REFERENCE),
            constant_baseline("row-loops", public, NAIVE),
            constant_baseline("joined-products", public, FUSED),
        )

    def defaults(self) -> dict[str, Any]:
        return {
            "levers": ["harness"],
            "author": {"name": "tuner", "params": {"positions": 1}},
            "evaluation": {"train_groups": 1, "train_samples": 1},
            # Dev is asked once, and a gain in all of its six examples would not reach the step of the guard.
            "gate": {"guard": "none"},
            "max_generations": 1,
        }


def _refused(what: str, next_step: str) -> ConfigError:
    return ConfigError(f"The task trimul {what}.", next_step=next_step)
