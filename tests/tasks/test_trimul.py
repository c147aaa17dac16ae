"""The task trimul: its maths, its splits, its statistics, and what it takes for a kernel."""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import time
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from bascule.plugins.registry import Registry
from bascule.plugins.task import RunsPrograms
from bascule.plugins.tasks import bascule_register, trimul_worker
from bascule.plugins.tasks.trimul import Trimul
from bascule.plugins.tasks.trimul_cases import FULL, SIZES, Case
from bascule.plugins.tasks.trimul_kernels import FUSED, NAIVE, REFERENCE, START
from bascule.plugins.tasks.trimul_link import Reply
from bascule.plugins.tasks.trimul_scorer import MAX_BYTES, TOLERANCE, difference, vectors
from bascule.plugins.tasks.trimul_timing import Coarse, Times, compare, hold_up
from bascule.schemas.errors import ConfigError, ScoringError
from bascule.schemas.events import Split
from bascule.schemas.harness import Tunable, make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored, Unscored

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")
SHAPES = [
    Case(n=7, batch=2, dim=24, distribution="cauchy", masked=True),
    Case(n=13, batch=1, dim=40),
    Case(n=1, batch=1, dim=16, masked=True),
]


def kernel(text: str, **params: object) -> Any:
    names: dict[str, Any] = {}
    exec(compile(text, "kernel.py", "exec"), names)
    names.get("PARAMS", {}).update(params)
    return names["custom_kernel"]


def made(case: Case, seed: int = 3) -> Any:
    return trimul_worker.inputs(torch, {"seed": seed, **msgspec.to_builtins(case)})


def oracle(data: Any) -> np.ndarray:
    """The update in float64 and loops over nothing but the definition."""
    x, mask, weights, _ = data
    w = {k: v.numpy().astype(np.float64) for k, v in weights.items()}

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        mean = values.mean(-1, keepdims=True)
        scale = np.sqrt(((values - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
        return (values - mean) / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gate(values: np.ndarray, name: str) -> np.ndarray:
        return 1 / (1 + np.exp(-(values @ w[f"{name}.weight"].T)))

    x = norm(x.numpy().astype(np.float64), "norm")
    keep = mask.numpy().astype(np.float64)[..., None]
    left = x @ w["left_proj.weight"].T * keep * gate(x, "left_gate")
    right = x @ w["right_proj.weight"].T * keep * gate(x, "right_gate")
    both = (left[:, :, None] * right[:, None]).sum(axis=3)
    return (norm(both, "to_out_norm") * gate(x, "out_gate")) @ w["to_out.weight"].T


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
@pytest.mark.parametrize("text", [REFERENCE, NAIVE, FUSED, START], ids=["reference", "naive", "fused", "start"])
def test_every_shipped_kernel_is_the_definition(text: str, case: Case) -> None:
    data = made(case)
    kept = trimul_worker.copied(data)
    out = kernel(text)(data)
    np.testing.assert_allclose(out.numpy(), oracle(data), rtol=2e-3, atol=2e-3)
    assert trimul_worker.fault(torch, out, data[0].shape) == ""
    assert not trimul_worker.changed(torch, data, kept)


def test_the_first_kernel_is_right_under_all_its_parameters_and_declares_them() -> None:
    literals = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(START).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    tunable = {k: msgspec.convert(v, Tunable) for k, v in literals["TUNABLE"].items()}
    assert set(tunable) == set(literals["PARAMS"])
    choices = {k: t.values or (int(t.low or 0), int(t.high or 0)) for k, t in tunable.items()}
    assert all(literals["PARAMS"][k] in (t.values or range(int(t.low), int(t.high))) for k, t in tunable.items())
    data = made(SHAPES[0])
    truth = oracle(data)
    for values in itertools.product(*choices.values()):
        out = kernel(START, **dict(zip(choices, values, strict=True)))(data)
        np.testing.assert_allclose(out.numpy(), truth, rtol=2e-3, atol=2e-3, err_msg=str(values))


def test_inputs_are_as_described() -> None:
    x, mask, weights, sizes = made(Case(n=40, batch=1, dim=64, distribution="cauchy", masked=True))
    assert sizes == {"dim": 64, "hidden_dim": 128}
    # Half of a Cauchy distribution's mass lies within its scale.
    assert abs(float((x.abs() < 2).float().mean()) - 0.5) < 0.02
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(float(mask.mean()) - 0.5) < 0.1
    assert weights["left_proj.weight"].shape == (128, 64)
    assert weights["to_out.weight"].shape == (64, 128)
    assert not torch.equal(x, made(Case(n=40, batch=1, dim=64, distribution="cauchy", masked=True), seed=4)[0])


@pytest.mark.parametrize("size", list(SIZES))
def test_no_size_of_a_shape_stands_in_two_splits_and_the_gate_can_tell(size: str) -> None:
    sizes = {s: {c.n for cases in SIZES[size][s] for c in cases} for s in SPLITS}
    assert not sizes["train"] & sizes["dev"]
    assert not sizes["train"] & sizes["sealed"]
    assert not sizes["dev"] & sizes["sealed"]
    public = Trimul({"size": size}).public()
    # A paired sign-flip test over six says p = 1/64 at best.
    assert len(public.dev) >= 6
    assert len(public.sealed) >= 6
    assert len({e.group for s in SPLITS for e in public.split(s)}) == sum(len(public.split(s)) for s in SPLITS)
    assert public.answers == {e.id: REFERENCE for e in public.train}


def test_every_full_example_has_three_shapes() -> None:
    for split in SPLITS:
        for cases in FULL[split]:
            assert len({(c.n, c.batch, c.dim) for c in cases}) == 3


def test_its_harness_answers_with_its_kernel_and_it_registers() -> None:
    registry = Registry()
    bascule_register(registry)
    task = registry.tasks.get("trimul")({})
    harness = make_harness(task.harness())
    names: dict[str, Any] = {}
    exec(compile(harness.files["harness.py"], "harness.py", "exec"), names)

    class Context:
        def file(self, name: str) -> str:
            return harness.files[name]

    assert names["solve"]({}, None, None, Context()) == START
    assert parse_config({"task": {"name": "trimul"}, **task.defaults()}).levers == ("harness",)
    assert isinstance(task.private(), RunsPrograms)
    public = task.public()
    for baseline in task.baselines(public):
        assert {s: list(a) for s, a in baseline.answers.items()} == {s: [e.id for e in public.split(s)] for s in SPLITS}


@pytest.mark.parametrize(
    "params",
    [
        *({"variant": "cuda"}, {"score_mode": "paper"}, {"size": "huge"}, {"pairs": 2}, {"pairs": True}),
        *({"pairs": 9.0}, {"seconds": 0}, {"seconds": "60"}, {"seed": 1}),
    ],
)
def test_a_wrong_parameter_is_refused_with_a_next_step(params: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refused:
        Trimul(params)
    assert refused.value.next_step


@pytest.mark.parametrize(
    "answer",
    [None, "", " \n", "def custom_kernel(", "x = 1\n", "custom_kernel\n", "#" * (MAX_BYTES + 1), "a\0b", "(" * 9000],
)
def test_what_is_no_kernel_is_a_failure_without_being_run(answer: str | None) -> None:
    face = Trimul({}).private()  # it has nothing to run programs with
    assert face.score("dev", "dev-0", answer) == Scored(reward=0.0, passed=False, well_formed=False)


def test_a_triton_kernel_without_triton_and_gpu_is_unscored_with_the_reason() -> None:
    face = Trimul({}).private()
    face._triton = False
    verdict = face.score("dev", "dev-0", "import triton\ndef custom_kernel(data): ...\n")
    assert isinstance(verdict, Unscored)
    assert "no GPU" in verdict.reason


def test_an_example_of_another_split_has_no_verdict_and_a_face_without_programs_says_so() -> None:
    face = Trimul({}).private()
    with pytest.raises(KeyError):
        face.score("dev", "sealed-0", REFERENCE)
    with pytest.raises(ScoringError):
        face.score("dev", "dev-0", REFERENCE)


def times(reference: float, candidate: float, *, jitter: float = 0.0, held: float = 1.0) -> Times:
    """Nine pairs; every other reference call is longer by ``jitter``."""
    processor = tuple(reference * (1 + jitter * (i % 2)) for i in range(10))
    return Times(reference=tuple(p * held for p in processor), processor=processor, candidate=(candidate,) * 9)


@pytest.mark.parametrize(
    ("measured", "speedup", "conclusive"),
    [
        ([times(3.0, 2.0)] * 3, 1.5, True),
        ([times(3.0, 6.0)] * 3, 0.5, False),
        ([times(1.0, 1.0)], 1.0, False),
        ([times(1.08, 1.0)], 1.0, False),
        ([times(1.0, 1.08)], 1.0, False),
        ([times(4.0, 1.0), times(1.0, 1.0)], 2.0, True),
        # A gain that the reference shows against itself as well is none; a loss stays one.
        ([times(1.2, 1.0, jitter=0.3)], 1.0, False),
        ([times(1.0, 2.0, jitter=0.3)], 0.57, False),
        # A candidate that keeps the core busy doubles the reference's time: it gains nothing, and loses nothing it had.
        ([times(1.0, 1.0, held=2.0)], 1.0, False),
        ([times(1.0, 2.0, held=2.0)], 0.5, False),
    ],
)
def test_only_what_chance_and_disturbance_cannot_explain_is_a_gain(
    measured: list[Times], speedup: float, conclusive: bool
) -> None:
    found = compare(measured, alone=1.0)
    assert found.speedup == pytest.approx(speedup, abs=0.01)
    assert found.conclusive is conclusive


def test_a_machine_that_is_busy_anyway_is_not_laid_at_the_candidates_door() -> None:
    busy = times(3.0, 2.0, held=2.0)
    assert hold_up(busy.reference, busy.processor) == pytest.approx(2.0)
    found = compare([busy], alone=2.0)
    assert found.held_up == 1.0
    assert found.speedup == pytest.approx(3.0)


def ticked(tick: float, calls: int, each: float) -> Times:
    """Calls of equal length, whose processor time a clock tells that moves in steps."""
    ends = [math.floor((i + 1) * each / tick) * tick for i in range(-1, calls + 1)]
    processor = tuple(b - a for a, b in pairwise(ends))
    return Times(reference=(each,) * (calls + 1), processor=processor, candidate=(each / 2,) * calls)


def test_a_coarse_clock_of_processor_time_takes_nothing_from_an_honest_kernel() -> None:
    measured = ticked(0.01, 40, 0.006)
    assert 0.0 in measured.processor
    alone = hold_up(measured.reference, measured.processor, 0.01)
    assert alone == pytest.approx(1.0, abs=0.1)
    assert compare([measured], alone, 0.01).speedup == pytest.approx(2.0)


def test_a_clock_that_tells_nothing_about_calls_so_short_gives_no_verdict() -> None:
    measured = ticked(0.01, 9, 0.001)
    with pytest.raises(Coarse, match="steps of 10 ms"):
        compare([measured], 1.0, 0.01)
    assert compare([measured], 1.0).held_up > 1000, "taken at its word it would say that the reference was held up"


def test_the_step_of_a_clock_is_what_it_really_moves_by() -> None:
    asked = itertools.count()
    assert trimul_worker.tick(lambda: next(asked) // 100 * 0.25) == 0.25


@pytest.mark.parametrize("step", [1e-6, 0.02, 1e9])
def test_the_peak_rate_is_plausible_whatever_the_clock_of_processor_time_is_worth(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.thread_time
    monkeypatch.setattr(trimul_worker, "PEAK_SECONDS", 0.02)
    monkeypatch.setattr(time, "thread_time", lambda: math.floor(real() / step) * step)
    assert 1e6 < trimul_worker.peak(torch, step) < trimul_worker.PLAUSIBLE


def test_an_output_is_compared_element_by_element_and_must_be_finite() -> None:
    right = np.array([0.0, 100.0, -1.0], dtype="<f4")
    within = right + np.array([0.9, 0.9, -0.9], dtype="<f4") * TOLERANCE * (1 + abs(right))
    beyond = right + np.array([0, 1.1, 0], dtype="<f4") * TOLERANCE * (1 + abs(right))
    assert difference(within.astype("<f4").tobytes(), right.tobytes()) == ""
    assert difference(beyond.astype("<f4").tobytes(), right.tobytes()).startswith("1 of 3")
    for odd in (np.nan, np.inf, -np.inf):
        assert "finite" in difference(np.array([0.0, 100.0, odd], dtype="<f4").tobytes(), right.tobytes())


def served(kernel: Any, case: Case) -> Reply:
    """What the worker replies to a checked call."""
    spec = msgspec.json.encode({"seed": 3, "check": True, **msgspec.to_builtins(case)})
    frames = (b"P" + spec, b"G" + vectors(case))
    sink = io.BytesIO()
    with torch.no_grad():
        source = io.BytesIO(b"".join(len(f).to_bytes(4, "big") + f for f in frames))
        trimul_worker.serve(torch, kernel, source, sink)
    return msgspec.json.decode(sink.getvalue()[trimul_worker.REPLY_BYTES :], type=Reply)


class Lazy(torch.Tensor):
    """A tensor that would compute when it is looked at."""


@pytest.mark.parametrize(
    ("cheat", "why"),
    [
        (lambda x, out: out, ""),
        (lambda x, out: out.as_subclass(Lazy), "the output is a Lazy"),
        (lambda x, out: out.half(), "not dense float32"),
        (lambda x, out: out.to_sparse(), "not dense float32"),
        (lambda x, out: out[:, :1].clone(), "has the shape"),
        (lambda x, out: torch.cat([out, out])[: out.shape[0]], "part of a larger tensor"),
        (lambda x, out: torch.cat([out, out])[out.shape[0] :], "part of a larger tensor"),
        (lambda x, out: out.transpose(1, 2).contiguous().transpose(1, 2), "not contiguous"),
        (lambda x, out: (x.zero_(), out)[1], "changed its inputs"),
        (lambda x, out: None, "the output is a NoneType"),
        (lambda x, out: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_the_worker_finds_what_has_not_the_form_of_an_output(cheat: Any, why: str) -> None:
    honest = kernel(REFERENCE)
    reply = served(lambda data: cheat(data[0], honest(data)), SHAPES[0])
    assert why in reply.why
    assert reply.ok is (why == "")


@pytest.mark.parametrize("text", ["x" * 9000, '"' * 9000, "\\" * 9000, "é\u2028\x00\x1b" * 900])
def test_a_reply_fits_its_frame_whatever_an_error_says(text: str) -> None:
    told = trimul_worker.told("the kernel failed", ValueError(text))
    body = json.dumps({"ok": False, "why": told, "sha256": "0" * 64, "cpu": 1.2345678901234567}).encode()
    assert len(body) <= trimul_worker.REPLY_BYTES
    assert msgspec.json.decode(body.ljust(trimul_worker.REPLY_BYTES), type=Reply).why == told


def test_the_tails_of_cauchy_inputs_are_cut_where_float32_can_still_hold_their_variance() -> None:
    case = Case(n=64, batch=2, dim=128, distribution="cauchy")
    largest = max(float(made(case, seed)[0].abs().max()) for seed in range(4))
    assert largest == 1e6


def test_a_reference_that_is_not_finite_is_no_fault_of_the_candidate() -> None:
    bad = np.array([np.nan], dtype="<f4").tobytes()
    with pytest.raises(ArithmeticError):
        difference(bad, bad)
