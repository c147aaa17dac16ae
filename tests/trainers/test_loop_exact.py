"""The loop's gradients are those of plain padded forward passes and plain losses, on whatever base and batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from bascule.plugins.algorithm import Credit, Stream
from bascule.schemas.errors import ConfigError, TrainError
from bascule.schemas.trajectory import (
    ModelCall,
    Output,
    Sampling,
    Step,
    ToolCall,
    Trajectory,
    pack_floats,
    pack_ids,
    unpack_floats,
    unpack_ids,
)
from bascule.trainers import loop
from bascule.trainers.base_model import load_model
from bascule.trainers.batch import MicroBatch, micro_batches, units_of, weighed
from bascule.trainers.forward import check_base, token_figures
from bascule.trainers.loop import TrainJob, UpdateMetrics
from bascule.trainers.lora import set_adapter_tensors
from bascule.trainers.params import TrainParams
from bascule.trainers.tensorfile import read_tensors
from tests.oracles import within
from tests.tiny_model import make_tiny_model
from tests.trainers.bandit import PARAMS, Given, alternating_credit, grouped, make_job, sample_batch, train

EXACT: dict[str, Any] = {**PARAMS, "max_grad_norm": 1e9, "epsilon": 0.02, "epsilon_high": 0.02, "learning_rate": 1e-2}
Gradients = dict[str, Tensor]


class Own(Given):
    """Decided credit, and a loss of its own that reads all there is."""

    def token_loss(self, inputs: Any, params: dict[str, Any]) -> Any:
        ratio = torch.exp(inputs.logprobs - inputs.old)
        return params["heat"] * inputs.logprobs**2 - inputs.advantage * ratio * torch.exp(inputs.old - inputs.behaviour)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def parent(base: Path) -> dict[str, bytes]:
    """An adapter whose two factors are both away from 0, so that all gradients are."""
    job = make_job(base, {**PARAMS, "learning_rate": 2e-2}, seed=2)
    for i in range(2):
        batch = sample_batch(job, seed=i)
        train(job, batch, alternating_credit(batch), i)
    return job.adapter_files()


def spoken(trajectory: Trajectory) -> list[tuple[list[int], list[int], float, list[float]]]:
    """Each output by itself: its prompt, its tokens, its temperature and the sampler's log-probabilities."""
    return [
        (unpack_ids(c.prompt_ids), unpack_ids(o.token_ids), c.sampling.temperature, unpack_floats(o.logprobs))
        for c in trajectory.steps
        if isinstance(c, ModelCall)
        for o in c.outputs
    ]


def plain(model: Any, batch: Mapping[str, Trajectory]) -> dict[str, tuple[Tensor, Tensor]]:
    """[T] log-probabilities and entropies of each trajectory's sampled tokens, from one right-padded forward pass."""
    rows = [(name, *turn) for name, t in batch.items() for turn in spoken(t)]
    longest = max(len(prompt) + len(ids) for _, prompt, ids, _, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, (_, prompt, ids, _, _) in enumerate(rows):
        tokens[i, : len(prompt) + len(ids)] = torch.tensor(prompt + ids)
        mask[i, : len(prompt) + len(ids)] = 1
    logits = model(input_ids=tokens, attention_mask=mask).logits.float()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in batch}
    for i, (name, prompt, ids, temperature, _) in enumerate(rows):
        logp = torch.log_softmax(logits[i, len(prompt) - 1 : len(prompt) - 1 + len(ids)] / temperature, -1)
        found[name].append((logp[torch.arange(len(ids)), ids], -(logp.exp() * logp).sum(-1)))
    return {name: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for name, parts in found.items()}


def conversations(model: Any, seed: int, groups: int = 2) -> dict[str, Trajectory]:
    """Four trajectories of each group: a tool between turns, a drift to another temperature, several outputs of a call,
    an output without tokens. The tokens are drawn at random; the sampler is near the model."""
    r = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [r.randrange(3, 300) for _ in range(n)]

    def call(prompt: list[int], *outputs: list[int], temperature: float = 1.0) -> ModelCall:
        return ModelCall(
            kind="chat",
            asked="",
            prompt_ids=pack_ids(prompt),
            outputs=tuple(
                Output(token_ids=pack_ids(o), logprobs=pack_floats([0.0] * len(o)), text="") for o in outputs
            ),
            sampling=Sampling(temperature=temperature),
        )

    tool = ToolCall(name="search", arguments="{}", result="{}")
    batch: dict[str, Trajectory] = {}
    for g in range(groups):
        prompt, a, b, c = ids(6 + g), ids(3), ids(2), ids(4)
        talks: list[tuple[Step, ...]] = [
            (call(prompt, a), tool, call([*prompt, *a, *ids(3)], b)),
            (call(prompt, a[:2]), tool, call([*prompt[:4], *ids(2)], c, temperature=0.7)),
            (call(prompt, b, c), call([*prompt, *c, *ids(2)], a), call([*prompt, *b, *ids(1)], ids(2))),
            (call(prompt, ids(3)), call([*prompt, *ids(2)], []), call([*prompt, *a[:1], *ids(2)], ids(2), ids(1))),
        ]
        batch |= {f"g{g}-s{i}": Trajectory(steps=steps) for i, steps in enumerate(talks)}
    with torch.no_grad():
        known = {name: logp for name, (logp, _) in plain(model, batch).items()}
    return {name: sampled_at(t, [float(x) + r.gauss(0, 0.2) for x in known[name]]) for name, t in batch.items()}


def sampled_at(trajectory: Trajectory, logprobs: Sequence[float]) -> Trajectory:
    """The trajectory with these as the sampler's log-probabilities, in the order of time."""
    rest = iter(logprobs)

    def again(output: Output) -> Output:
        return msgspec.structs.replace(output, logprobs=pack_floats([next(rest) for _ in unpack_ids(output.token_ids)]))

    steps = [
        msgspec.structs.replace(step, outputs=tuple(map(again, step.outputs))) if isinstance(step, ModelCall) else step
        for step in trajectory.steps
    ]
    return Trajectory(steps=tuple(steps))


def all_components(batch: Mapping[str, Trajectory]) -> list[Credit]:
    """In each group one of every component, the second and the third each in two."""
    credit = []
    for g in sorted({name.partition("-")[0] for name in batch}):
        tokens = sum(len(ids) for _, ids, _, _ in spoken(batch[f"{g}-s0"]))
        by_token = tuple(0.5 * (-1.0) ** t * (1 + t) for t in range(tokens))
        credit += [
            Credit(trajectory=f"{g}-s0", component="policy", advantage=by_token),
            Credit(trajectory=f"{g}-s1", component="policy", advantage=-1.5),
            Credit(trajectory=f"{g}-s2", component="reinforce", advantage=0.7),
            Credit(trajectory=f"{g}-s3", component="imitation", advantage=0.5),
            Credit(trajectory=f"{g}-s3", component="own", advantage=1.2),
            Credit(trajectory=f"{g}-s1", component="pair", advantage=1.0, rejected=f"{g}-s2"),
            Credit(trajectory=f"{g}-s1", component="pair", advantage=0.5, rejected=f"{g}-s0"),
        ]
    return credit


Plain = dict[str, tuple[Tensor, Tensor]]


def plain_loss(
    now: Plain, old: Plain, ref: Plain, batch: Mapping[str, Trajectory], credit: Sequence[Credit], p: TrainParams
) -> Tensor:
    """The loss of one optimiser step, a trajectory after the other."""

    def tokens(component: str) -> int:
        return sum(len(now[c.trajectory][0]) for c in credit if c.component == component)

    def number(component: str) -> int:
        return sum(c.component == component for c in credit)

    imitated = sum(float(c.advantage) * len(now[c.trajectory][0]) for c in credit if c.component == "imitation")
    total = torch.zeros(())
    for c in credit:
        pi, entropy = now[c.trajectory]
        before = old[c.trajectory][0]
        mu = torch.tensor([x for _, _, _, logprobs in spoken(batch[c.trajectory]) for x in logprobs])
        a = torch.tensor(c.advantage)
        if c.component == "imitation":
            total = total - (a * pi).sum() / imitated
            continue
        if c.component == "pair":
            assert c.rejected is not None
            gain = [(now[t][0] - ref[t][0]).sum() for t in (c.trajectory, c.rejected)]
            total = total - a * torch.nn.functional.logsigmoid(p.beta * (gain[0] - gain[1])) / number("pair")
            continue
        if c.component == "policy":
            ratio = torch.exp(pi - before)
            if p.importance_sampling_level == "sequence":
                ratio = torch.exp((pi.detach() - before).mean()) * torch.exp(pi - pi.detach())
            clipped = ratio.clamp(1 - p.epsilon, 1 + p.epsilon_high)
            per_token = torch.exp(before - mu).clamp(max=p.importance_cap) * torch.maximum(-a * ratio, -a * clipped)
        elif c.component == "reinforce":
            per_token = -torch.exp(pi.detach() - mu).clamp(max=p.importance_cap) * a * pi
        else:
            per_token = 0.1 * pi**2 - a * torch.exp(pi - before) * torch.exp(before - mu)
        if c.component != "own":
            d = ref[c.trajectory][0] - pi
            k3 = (torch.exp(d) - d - 1) * torch.exp(pi - before)
            per_token = per_token + p.beta * (d**2 / 2 if p.kl_estimator == "k2" else k3) - p.entropy_coef * entropy
        divisor = {
            "dapo": tokens(c.component),
            "grpo": len(pi) * number(c.component),
            "dr_grpo": p.max_completion_length * number(c.component),
        }[p.loss_type]
        total = total + per_token.sum() / divisor
    return total


def gradients(job: TrainJob) -> Gradients:
    return {n: p.grad.clone() for n, p in job.model.named_parameters() if p.grad is not None}


def apart(got: Gradients, wanted: Gradients) -> float:
    """Largest difference of two gradients, as a share of the largest entry."""
    assert set(got) == set(wanted)
    largest = max(float(w.abs().max()) for w in wanted.values())
    assert largest > 0
    return max(float((got[n] - w).abs().max()) for n, w in wanted.items()) / largest


def steps_of(
    job: TrainJob, batch: Mapping[str, Trajectory], credit: Sequence[Credit]
) -> tuple[list[tuple[dict[str, Tensor], Gradients, float]], UpdateMetrics]:
    """The adapter before each optimiser step, that step's gradient and loss; and the update's figures."""
    found: list[tuple[dict[str, Tensor], Gradients, float]] = []
    adapters = [adapter(job)]

    def watch(figures: dict[str, float]) -> None:
        found.append((adapters[-1], gradients(job), figures["loss"]))
        adapters.append(adapter(job))

    assert isinstance(job.algorithm, Given)
    job.algorithm.given = list(credit)
    metrics = job.update(grouped(batch, dict.fromkeys(batch, 0.0)), batch, job.iteration, watch)
    return found, metrics


def adapter(job: TrainJob) -> dict[str, Tensor]:
    tensors, _ = read_tensors(job.adapter_files()["adapter_model.safetensors"], "test")
    return tensors


CASES: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"importance_sampling_level": "sequence"},
    "entropy": {"entropy_coef": 0.05},
    "k2": {"beta": 0.2},
    "k3": {"beta": 0.2, "kl_estimator": "k3", "loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 7},
}


@pytest.mark.parametrize("max_nodes", [1, 60, 4096])
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_step_has_the_gradient_of_plain_passes_and_plain_losses(
    base: Path, parent: dict[str, bytes], case: str, max_nodes: int
) -> None:
    params = {**EXACT, "beta": 0.1, **CASES[case], "num_iterations": 2, "num_mini_batches": 2, "max_nodes": max_nodes}
    job = TrainJob(base, Own(), {**params, "heat": 0.1}, 2, parent)
    other = make_job(base, params, seed=2, parent_adapter=parent)
    batch = conversations(other.model, seed=3)
    credit = all_components(batch)
    found, metrics = steps_of(job, batch, credit)
    assert len(found) == 4
    assert metrics.trained_tokens == sum(
        sum(len(ids) for _, ids, _, _ in spoken(batch[t]))
        for c in credit
        for t in ([c.trajectory, c.rejected] if c.rejected else [c.trajectory])
    )
    with torch.no_grad():
        old = plain(other.model, batch)
        with other.model.disable_adapter():
            ref = plain(other.model, batch)
    losses = []
    for i, (tensors, gradient, loss) in enumerate(found):
        set_adapter_tensors(other.model, tensors)
        part = [c for c in credit if c.trajectory.startswith(f"g{i % 2}")]
        here = {t: x for t, x in batch.items() if t.startswith(f"g{i % 2}")}
        for p in other.model.parameters():
            p.grad = None
        wanted = plain_loss(plain(other.model, here), old, ref, batch, part, job.params)
        wanted.backward()  # type: ignore[no-untyped-call]
        losses.append(float(wanted.detach()))
        within(f"gradient of a step ({case})", "plain padded forward", apart(gradient, gradients(other)), 1e-5)
        within(f"loss of a step ({case})", "plain padded forward", abs(loss - losses[-1]) / abs(losses[-1]), 1e-5)
    assert len(set(losses)) == 4
    assert metrics.clip_fraction > 0


def test_only_states_before_sampled_tokens_are_read(
    base: Path, parent: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States at the prompt, at what tools and environment said and at ends of turns are replaced by NaN."""
    params = {**EXACT, "beta": 0.1, "entropy_coef": 0.05, "num_iterations": 2}
    clean, poisoned = (TrainJob(base, Own(), {**params, "heat": 0.1}, 2, parent) for _ in range(2))
    batch = conversations(clean.model, seed=3)
    credit = all_components(batch)
    before_sampled = {
        tuple(prompt + ids[:t]) for x in batch.values() for prompt, ids, _, _ in spoken(x) for t in range(len(ids))
    }
    wanted, _ = steps_of(clean, batch, credit)
    now: list[MicroBatch] = []
    hidden = 0

    def spy(model: Any, batch: MicroBatch, **kwargs: Any) -> Any:
        now[:] = [batch]
        return token_figures(model, batch, **kwargs)

    def poison(_module: Any, _inputs: Any, output: Any) -> Any:
        nonlocal hidden
        tree = now[0].tree
        paths: list[tuple[int, ...]] = []
        for token, over in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            paths.append((*(paths[over] if over >= 0 else ()), token))
        keep = torch.tensor([path in before_sampled for path in paths])
        hidden += int((~keep).sum())
        output.last_hidden_state = torch.where(keep[None, :, None], output.last_hidden_state, torch.nan)
        return output

    monkeypatch.setattr(loop, "token_figures", spy)
    decoder: Any = poisoned.model.get_base_model().get_decoder()
    decoder.register_forward_hook(poison)
    got, _ = steps_of(poisoned, batch, credit)
    assert hidden > 0
    for (_, a, one), (_, b, other) in zip(wanted, got, strict=True):
        assert one == other
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert poisoned.checkpoint() == clean.checkpoint()


def test_large_trees_that_compute_activations_again_have_the_same_gradient(
    base: Path, parent: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dropout in (0.0, 0.3):
        params = {**EXACT, "lora_dropout": dropout, "max_nodes": 4096, "max_ratio": 1e9, "max_kl": 1e9}
        kept, again = (make_job(base, params, seed=2, parent_adapter=parent) for _ in range(2))
        batch = sample_batch(kept, seed=7)
        credit = alternating_credit(batch)
        monkeypatch.setattr(loop, "KEEP_BYTES", 2**60)
        train(kept, batch, credit, 0)
        monkeypatch.setattr(loop, "KEEP_BYTES", 0)
        passes = []
        layer: Any = again.model.get_base_model().get_decoder().layers[0]  # type: ignore[operator]
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))  # noqa: B023
        train(again, batch, credit, 0)
        assert passes.count(True) == 2
        what = f"gradient with activations computed again (dropout {dropout:g})"
        within(what, "activations kept", apart(gradients(again), gradients(kept)), 1e-6)


def dropped(base: Path, parent: dict[str, bytes], seed: int = 2, **params: Any) -> TrainJob:
    lax = {"max_kl": 1e9, "max_ratio": 1e9}
    return make_job(base, {**PARAMS, **lax, "lora_dropout": 0.2, "num_iterations": 2, **params}, seed, parent)


def test_dropout_is_drawn_from_the_seed_and_resumes(base: Path, parent: dict[str, bytes]) -> None:
    still = dropped(base, parent)
    batches = [sample_batch(still, seed=i) for i in range(3)]

    def go(job: TrainJob, first: int, last: int, torch_seed: int) -> TrainJob:
        torch.manual_seed(torch_seed)  # what others draw does not matter
        for i in range(first, last):
            train(job, batches[i], alternating_credit(batches[i]), i)
        return job

    one = go(dropped(base, parent), 0, 2, torch_seed=1)
    blob = one.checkpoint()
    go(one, 2, 3, torch_seed=2)
    assert go(dropped(base, parent), 0, 3, torch_seed=3).checkpoint() == one.checkpoint()
    resumed = dropped(base, parent)
    resumed.restore(blob)
    assert go(resumed, 2, 3, torch_seed=4).checkpoint() == one.checkpoint()
    for other in (dropped(base, parent, lora_dropout=0.0), dropped(base, parent, seed=3)):
        assert go(other, 0, 3, torch_seed=1).adapter_files() != one.adapter_files()


def test_the_ratio_with_dropout_is_to_the_policy_without_it(base: Path, parent: dict[str, bytes]) -> None:
    """The sampler has no dropout, so the figures that compare it with the trainer stay those of an equal policy."""
    job = dropped(base, parent, num_iterations=1, max_grad_norm=1e9)
    batch = sample_batch(job, seed=0)
    credit = [c for c in alternating_credit(batch) if c.component == "policy"]
    metrics = train(job, batch, credit, 0)
    assert metrics.kl == pytest.approx(0, abs=1e-6)
    assert metrics.ess == pytest.approx(1, abs=1e-4)
    assert metrics.clip_fraction > 0.1  # of tokens whose own probability dropout has moved by more than the bound


def fits(nodes: int, error: Callable[[], BaseException]) -> Callable[..., Any]:
    """A pass that has memory for so many nodes."""

    def compute(model: Any, batch: MicroBatch, **kwargs: Any) -> Any:
        if len(batch.tree.tokens) > nodes:
            raise error()
        return token_figures(model, batch, **kwargs)

    return compute


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, lambda: RuntimeError(ALLOCATOR)])
@pytest.mark.parametrize("streams", [frozenset(), frozenset({"policy"})])
def test_memory_that_runs_out_halves_the_micro_batches_once(
    base: Path,
    parent: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], BaseException],
    streams: frozenset[Stream],
) -> None:
    params = {**EXACT, "max_nodes": 64}
    job, small = (make_job(base, {**params, "max_nodes": n}, 2, parent) for n in (64, 32))
    job.algorithm.streams = small.algorithm.streams = streams
    batch = sample_batch(job, seed=7)
    credit = alternating_credit(batch)
    train(small, batch, credit, 0)
    monkeypatch.setattr(loop, "token_figures", fits(32, error))
    metrics = train(job, batch, credit, 0)
    assert metrics.max_nodes == 32
    within("adapter after memory ran out", "the smaller micro-batches", distance(job, small), 1e-5)
    assert gradients(job).keys() == gradients(small).keys()
    assert all(torch.equal(g, gradients(small)[n]) for n, g in gradients(job).items())

    resumed = make_job(base, params, 2, parent)
    resumed.restore(job.checkpoint())
    monkeypatch.setattr(loop, "token_figures", fits(16, error))
    for again in (job, resumed):
        with pytest.raises(TrainError, match=r"micro-batches of 32 nodes.*max_nodes below 32"):
            train(again, batch, credit, 1)


def test_a_micro_batch_of_one_node_is_not_halved(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(base, {**PARAMS, "max_nodes": 1}, seed=1)
    batch = sample_batch(job, seed=0)
    monkeypatch.setattr(loop, "token_figures", fits(0, torch.OutOfMemoryError))
    with pytest.raises(TrainError, match="Memory ran out"):
        train(job, batch, alternating_credit(batch), 0)


def test_another_error_of_torch_is_not_taken_for_one_of_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    monkeypatch.setattr(loop, "token_figures", fits(0, lambda: RuntimeError("sizes of tensors must match")))
    with pytest.raises(RuntimeError, match="sizes"):
        train(job, batch, alternating_credit(batch), 0)


def distance(one: TrainJob, other: TrainJob) -> float:
    theirs = adapter(other)
    return max(float((x - theirs[k]).abs().max()) for k, x in adapter(one).items())


@pytest.mark.parametrize("what", ["unscored", "empty", "nothing"])
def test_what_cannot_be_trained_on_changes_nothing_but_the_count(base: Path, what: str) -> None:
    algorithm = Given()
    algorithm.streams = frozenset({"policy", "reference", "values"})
    job = TrainJob(base, algorithm, {**PARAMS, "num_mini_batches": 3, "target_kl": 0.1, "kl_coef": 0.1}, 1)
    before = job.adapter_files()
    output = Output(token_ids=b"", logprobs=b"", text="")
    call = ModelCall(kind="chat", asked="", prompt_ids=pack_ids([5]), outputs=(output,), sampling=Sampling())
    empty = {"e0-s0": Trajectory(), "e0-s1": Trajectory(steps=(call,))}
    batch = {"unscored": sample_batch(job, seed=0, samples=2), "empty": empty, "nothing": {}}[what]
    if what == "empty":
        algorithm.given = [Credit(trajectory=t, component="policy", advantage=1.0) for t in empty]
    metrics = job.update(grouped(batch, dict.fromkeys(batch, None if what == "unscored" else 1.0)), batch, 0)
    assert (metrics.loss, metrics.trained_tokens, metrics.nodes, metrics.optimizer_steps) == (0, 0, 0, 0)
    assert job.iteration == 1
    assert job.adapter_files() == before


def test_credit_for_what_has_no_score_is_refused(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    job.algorithm.given = alternating_credit(batch)  # type: ignore[attr-defined]
    with pytest.raises(TrainError, match="p1-s0, which has no score"):
        job.update(grouped(batch, {t: None if t == "p1-s0" else 1.0 for t in batch}), batch, 0)
    there = grouped({t: x for t, x in batch.items() if not t.startswith("p2")}, dict.fromkeys(batch, 1.0))
    with pytest.raises(TrainError, match="p2-s0, which has no score"):
        job.update(there, batch, 0)


def test_no_pass_is_made_for_figures_that_no_loss_reads(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []

    def spy(model: Any, batch: MicroBatch, **kwargs: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return token_figures(model, batch, **kwargs)

    monkeypatch.setattr(loop, "token_figures", spy)
    for component, before in (("imitation", 0), ("policy", 1)):
        passes.clear()
        job = make_job(base, {**PARAMS, "num_iterations": 2, "max_nodes": 4096}, seed=1)
        batch = sample_batch(job, seed=0)
        train(job, batch, [Credit(trajectory=t, component=component, advantage=1.0) for t in batch], 0)
        assert passes == [False] * before + [True] * 2


def test_credit_that_is_no_number_is_refused_before_anything_moves(base: Path) -> None:
    job = make_job(base, PARAMS, seed=1)
    batch = sample_batch(job, seed=0)
    before = job.checkpoint()
    for bad in (float("nan"), (1.0, float("inf"), 0.0)):
        credit = [*alternating_credit(batch)[1:], Credit(trajectory="p0-s0", component="policy", advantage=bad)]
        with pytest.raises(TrainError, match="p0-s0 has the policy credit"):
            train(job, batch, credit, 0)
    assert job.checkpoint() == before


def test_the_guard_against_another_policy_looks_at_every_mini_batch(base: Path) -> None:
    job = make_job(base, {**PARAMS, "num_mini_batches": 3}, seed=1)
    batch = sample_batch(job, seed=0)
    last = {
        t: sampled_at(x, [p - 2.0 for *_, logprobs in spoken(x) for p in logprobs]) if t.startswith("p2") else x
        for t, x in batch.items()
    }
    with pytest.raises(TrainError, match="max_kl"):
        train(job, last, alternating_credit(batch), 0)


def tiny(kind: str, **more: Any) -> Any:
    """A model of two small layers of some architecture, with weights large enough for tokens to matter."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")(**{**shape, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


ALTERNATING = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Mixtral": {**EXPERTS, "sliding_window": 5},
    "Phi3": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Gemma3": {"sliding_window": 5, "layer_types": ALTERNATING},
    "Olmo3": {"sliding_window": 5, "layer_types": ALTERNATING},
    "SmolLM3": {},
    "GPTNeoX": {},
    "Phimoe": {"num_local_experts": 4, "sliding_window": 5},
    "Starcoder2": {"sliding_window": 5},
    "GptOss": {**EXPERTS, "sliding_window": 5, "layer_types": ALTERNATING},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_tree_pass_of_other_architectures_is_their_plain_pass(kind: str) -> None:
    model = tiny(kind, **KINDS[kind])
    check_base(model)
    batch = conversations(model, seed=5)
    credit = [Credit(trajectory=t, component="policy", advantage=1.0) for t in batch]
    (tree,) = micro_batches(weighed(units_of(credit, batch), TrainParams()), 10_000)
    assert max(tree.tree.positions) >= 10
    with torch.no_grad():
        wanted = plain(model, batch)
        got = token_figures(model, tree)
    order = [(tree.trajectories[int(t)], int(p)) for t, p in zip(tree.trajectory, tree.place, strict=True)]
    logprobs, entropy = (torch.stack([wanted[t][i][p] for t, p in order]) for i in range(2))
    assert float(logprobs.std()) > 0.1
    within(f"log-probabilities of {kind}'s tree", "its plain pass", float((got.logprobs - logprobs).abs().max()), 1e-4)
    within(f"entropies of {kind}'s tree", "its plain pass", float((got.entropy - entropy).abs().max()), 1e-4)


@pytest.mark.parametrize("kind", ["GptOss", "Mixtral"])
def test_adapters_of_experts_have_the_gradient_of_plain_passes_also_where_activations_are_computed_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = {"router_jitter_noise": 0.5} if kind == "Mixtral" else {}  # acts in training mode, and must not
    tiny(kind, **KINDS[kind], **noise).save_pretrained(tmp_path)
    params = {
        **EXACT,
        "lora_target_modules": ["q_proj", "o_proj"],
        "lora_target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    }
    monkeypatch.setattr(loop, "KEEP_BYTES", 0)
    jobs = [make_job(tmp_path, {**params, "max_nodes": n}, 2) for n in (30, 30, 4096)]
    batch = conversations(jobs[0].model, seed=3)
    credit = [Credit(trajectory=t, component="imitation", advantage=1.0) for t in batch]
    for i in range(2):  # both factors are away from 0 at the second step
        before = adapter(jobs[0])
        for job in jobs[1:]:
            set_adapter_tensors(job.model, before)
        train(jobs[0], batch, credit, i)
        train(jobs[2], batch, credit, i)
        for p in jobs[1].model.parameters():
            p.grad = None
        logprobs = torch.cat([x for x, _ in plain(jobs[1].model, batch).values()])
        (-logprobs.mean()).backward()
        for job in (jobs[0], jobs[2]):
            deviation = apart(gradients(job), gradients(jobs[1]))
            within(f"gradient of {kind}'s experts", "plain padded forward", deviation, 1e-5)


def test_models_that_the_tree_pass_would_compute_otherwise_are_refused() -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("Gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("Cohere", {"logit_scale": 0.0625}, "logit_scale"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling"),
        ("Qwen3Next", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
        ("Rwkv", {}, "another kind of attention"),
        ("RecurrentGemma", {}, "another kind of attention"),
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "another kind of attention"),
        ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "another kind of attention"),
    ]
    for kind, more, what in refused:
        with pytest.raises(ConfigError, match=what) as error:
            check_base(tiny(kind, **more))
        assert error.value.next_step


def test_bfloat16_weights_train_near_the_gradient_of_float32(
    base: Path, parent: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {**EXACT, "max_ratio": 1e9, "max_kl": 9.0, "entropy_coef": 0.01}
    whole = make_job(base, params, 2, parent)
    monkeypatch.setattr(loop, "load_model", lambda folder: load_model(folder).to(torch.bfloat16))
    half = make_job(base, params, 2, parent)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}
    batch = sample_batch(whole, seed=7)
    credit = alternating_credit(batch)
    for job in (whole, half):
        train(job, batch, credit, 0)
    one, other = (torch.cat([g.flatten() for g in gradients(job).values()]) for job in (whole, half))
    deviation = float((one - other).norm() / one.norm())
    assert deviation > 0
    within("gradient in bfloat16 (norm of the difference)", "float32", deviation, 0.1)
