"""One optimiser step of the training loop against one of TRL's GRPOTrainer, on the same recorded batch.

Each side has a process of its own, which says how much memory it took at most, and the two take their steps in turns.
That both compute the same is shown by the loss and the gradients of a step in float64; how far each side's float32
gradients are from those, by rounding alone, is printed beside it.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bascule.plugins.algorithm import Credit, Group, Requires, Sample, Stream
from bascule.plugins.extras import install_command
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_floats, pack_ids
from bascule.trainers.base_model import DEFAULT_MODEL, load_model, load_tokenizer, resolve_model
from ops.bench.report import Figure, figure

THREADS = 2
STEPS = 5
SAMPLES = 8
PARAMS: dict[str, Any] = {"lora_r": 32, "lora_alpha": 64, "learning_rate": 1e-6, "max_grad_norm": 1e9}
LOSS_BOUND = 1e-6
GRADIENT_BOUND = 1e-5


@dataclass(frozen=True)
class Setting:
    """A batch of :data:`SAMPLES` completions.

    Attributes:
        prompt: tokens of a prompt, P.
        completion: tokens of a completion, C.
        target: how many times faster than TRL the step is to be; None for a control.
        shared: whether the completions have one prompt, or each its own.
        vocabulary: of a model of the same shape with random weights; None for the model itself.
    """

    prompt: int
    completion: int
    target: float | None
    shared: bool = True
    vocabulary: int | None = None

    @property
    def name(self) -> str:
        prompts = "" if self.shared else ", unshared"
        vocabulary = "" if self.vocabulary is None else f", vocabulary {self.vocabulary}"
        return f"P{self.prompt} C{self.completion}{prompts}{vocabulary}"


SETTINGS = (
    Setting(256, 8, 9.0),
    Setting(128, 8, 7.0),
    Setting(64, 16, 3.5),
    Setting(128, 64, 2.5),
    Setting(128, 64, 1.0, shared=False),
    Setting(128, 8, None, vocabulary=512),
)


@dataclass(frozen=True)
class Batch:
    """What both sides train on: prompts, completions, the sampler's log-probabilities and an advantage for each row."""

    prompts: list[list[int]]
    completions: list[list[int]]
    behaviour: list[list[float]]
    advantages: list[float]


@dataclass(frozen=True)
class Side:
    """What a side says of itself: seconds of each step after the first, its first loss and gradient, GiB at most."""

    seconds: list[float]
    loss: float
    gradient: dict[str, Any]
    memory: float


class Fixed:
    """An algorithm with the advantages of the batch."""

    name = "fixed"
    version = "1"
    requires = Requires()
    streams: frozenset[Stream] = frozenset()

    def __init__(self, advantages: Sequence[float]) -> None:
        self._advantages = advantages

    def defaults(self) -> dict[str, Any]:
        """None."""
        return {}

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """The advantages, in the order of the samples' names."""
        del groups, params
        return [
            Credit(trajectory=f"s{i}", component="policy", advantage=advantage)
            for i, advantage in enumerate(self._advantages)
        ]


def run(settings: Sequence[Setting] = SETTINGS, steps: int = STEPS) -> tuple[dict[str, Figure], list[str]]:
    """Measure every setting, with TRL's defaults and again with its gradient checkpointing off."""
    if importlib.util.find_spec("trl") is None:
        sys.exit(f"This benchmark compares with TRL, which is not installed: {install_command('trl')}")
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    figures: dict[str, Figure] = {}
    notes: list[str] = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            base, parent = _base(setting, Path(folder)), Path(folder) / "parent"
            batch = _batch(setting, base, parent)
            ours, theirs = _in_turns((base, parent, batch), (_ours, _trl), steps)
            again, plain = _in_turns((base, parent, batch), (_ours, _trl_keeping_activations), steps)
            exact, reference = _in_turns((base, parent, batch), (_ours_in_float64, _trl_in_float64), 0)
        ratio = _ratio(ours, theirs)
        parity = abs(exact.loss / reference.loss - 1), _gradient_parity(exact, reference)
        rounding = _gradient_parity(ours, exact), _gradient_parity(theirs, exact)
        figures[f"{setting.name}: step"] = figure(ours.seconds, "s", baseline="TRL", ratio=ratio)
        figures[f"{setting.name}: TRL's step"] = figure(theirs.seconds, "s")
        figures[f"{setting.name}: peak memory"] = figure(
            [ours.memory], "GiB", baseline="TRL", ratio=theirs.memory / ours.memory
        )
        notes.append(
            _note(setting, ratio, _ratio(again, plain), parity, rounding, (ours.memory, theirs.memory, plain.memory))
        )
        print(notes[-1], file=sys.stderr, flush=True)
    return figures, [*notes, _versions()]


def _ratio(ours: Side, theirs: Side) -> float:
    return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def _note(
    setting: Setting,
    ratio: float,
    plain: float,
    parity: tuple[float, float],
    rounding: tuple[float, float],
    memory: tuple[float, float, float],
) -> str:
    over = not (parity[0] <= LOSS_BOUND and parity[1] <= GRADIENT_BOUND)
    target = "a control" if setting.target is None else f"at least {setting.target:g}"
    under = setting.target is not None and (ratio < setting.target or memory[0] > memory[1])
    return (
        f"{'FAIL' if over else 'UNDER' if under else 'ok'} {setting.name}: {ratio:.2f} times TRL ({target}), "
        f"{plain:.2f} times TRL with gradient_checkpointing=False; loss within {parity[0]:.1e} ({LOSS_BOUND:g}), "
        f"gradient within {parity[1]:.1e} ({GRADIENT_BOUND:g}); in float32 {rounding[0]:.1e} from it, TRL's "
        f"{rounding[1]:.1e}; {memory[0]:.2f} GiB, TRL {memory[1]:.2f} and {memory[2]:.2f}"
    )


def _versions() -> str:
    from importlib.metadata import version

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return (
        f"{libraries}; {THREADS} threads, float32, {SAMPLES} completions, LoRA r=32 on all linear layers. TRL's "
        "default is gradient_checkpointing=True. Prompts are random tokens, completions the model's own samples; the "
        "recorded log-probabilities are off by up to 0.1, so that the losses depend on the model."
    )


def _gradient_parity(ours: Side, theirs: Side) -> float:
    """The largest difference of two components over the largest component of ``theirs``."""
    assert ours.gradient.keys() == theirs.gradient.keys(), "the two sides train different parameters"
    difference = max(float(abs(g - theirs.gradient[name]).max()) for name, g in ours.gradient.items())
    return difference / max(float(abs(g).max()) for g in theirs.gradient.values())


def _base(setting: Setting, folder: Path) -> Path:
    """The model's folder, or that of a control made in ``folder``."""
    model = resolve_model(DEFAULT_MODEL)
    if setting.vocabulary is None:
        return model
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as untyped

    logging: Any = untyped
    logging.disable_progress_bar()
    control = folder / "control"
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = setting.vocabulary
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(control)
    for file in model.glob("*token*"):
        shutil.copy(file, control)
    return control


def _batch(setting: Setting, base: Path, parent: Path) -> Batch:
    """Sample the batch from the model with a random adapter, whose files are written to ``parent``."""
    import torch

    from bascule.trainers.lora import adapter_files, attach_lora
    from bascule.trainers.params import train_params

    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(setting.prompt)
    model: Any = attach_lora(load_model(base), train_params(PARAMS), seed=0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01, generator=generator)
    parent.mkdir()
    for name, data in adapter_files(model).items():
        (parent / name).write_bytes(data)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(3, vocabulary, (1 if setting.shared else SAMPLES, setting.prompt), generator=generator)
    prompts = prompts.expand(SAMPLES, -1)
    with torch.inference_mode():
        cache, step, held = None, prompts, prompts
        for _ in range(setting.completion):
            out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            step = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            held = torch.cat([held, step], 1)
        logits = model(input_ids=held, logits_to_keep=setting.completion + 1).logits[:, :-1].float()
        completions = held[:, setting.prompt :]
        exact = logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    noise = torch.rand(exact.shape, generator=generator) * 0.2 - 0.1
    return Batch(
        prompts.tolist(),
        completions.tolist(),
        (exact + noise).tolist(),
        [1 + (-1) ** i * i / 4 for i in range(SAMPLES)],
    )


def _in_turns(given: tuple[Path, Path, Batch], sides: Sequence[Callable[..., None]], steps: int) -> tuple[Side, ...]:
    """Run the sides in processes of their own, of which one at a time takes a step."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes = []
    for side in sides:
        end, other = context.Pipe()
        processes.append(context.Process(target=side, args=(other, *given, steps), daemon=True))
        processes[-1].start()
        other.close()
        ends.append(end)
        end.recv()  # ready: start-ups do not disturb each other either
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(steps + 1):
        for i, end in enumerate(ends):
            end.send(None)
            seconds[i].append(end.recv())
    found = tuple(Side(s[1:], *end.recv()) for s, end in zip(seconds, ends, strict=True))
    for process in processes:
        process.join()
    return found


def _peak() -> float:
    """GiB that this process has held at most; unlike ru_maxrss it does not begin with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def _ours_in_float64(pipe: Connection, base: Path, parent: Path, batch: Batch, steps: int) -> None:
    _ours(pipe, base, parent, batch, steps, double=True)


def _ours(pipe: Connection, base: Path, parent: Path, batch: Batch, steps: int, *, double: bool = False) -> None:
    import torch

    from bascule.trainers.loop import TrainJob

    torch.set_num_threads(THREADS)
    trajectories = {
        f"s{i}": Trajectory(
            steps=(
                ModelCall(
                    kind="completion",
                    asked="",
                    prompt_ids=pack_ids(prompt),
                    outputs=(Output(token_ids=pack_ids(ids), logprobs=pack_floats(logprobs), text=""),),
                    sampling=Sampling(temperature=1.0),
                ),
            )
        )
        for i, (prompt, ids, logprobs) in enumerate(zip(batch.prompts, batch.completions, batch.behaviour, strict=True))
    }
    samples = tuple(
        Sample(trajectory=t, reward=0.0, passed=None, tokens=len(batch.completions[0])) for t in trajectories
    )
    files = {file.name: file.read_bytes() for file in parent.iterdir()}
    params = {**PARAMS, "steps": steps + 1}
    job = TrainJob(base, Fixed(batch.advantages), params, seed=0, parent_adapter=files)
    if double:
        job.model.double()
    groups = [Group(example="bench", samples=samples)]
    loss, gradient = math.nan, {}
    pipe.send("ready")
    for i in range(steps + 1):
        pipe.recv()
        start = time.perf_counter()
        metrics = job.update(groups, trajectories, i)
        pipe.send(time.perf_counter() - start)
        if i == 0:
            loss, gradient = metrics.loss, _gradient(job.model)
    pipe.send((loss, gradient, _peak()))


def _gradient(model: Any) -> dict[str, Any]:
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


def _trl_keeping_activations(pipe: Connection, base: Path, parent: Path, batch: Batch, steps: int) -> None:
    _trl(pipe, base, parent, batch, steps, gradient_checkpointing=False)


def _trl_in_float64(pipe: Connection, base: Path, parent: Path, batch: Batch, steps: int) -> None:
    _trl(pipe, base, parent, batch, steps, double=True)


def _trl(
    pipe: Connection, base: Path, parent: Path, batch: Batch, steps: int, *, double: bool = False, **given: Any
) -> None:
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from bascule.trainers.lora import attach_lora, load_adapter, with_adapter
    from bascule.trainers.params import train_params

    torch.set_num_threads(THREADS)
    files = {file.name: file.read_bytes() for file in parent.iterdir()}
    model = attach_lora(load_model(base), with_adapter(train_params(PARAMS), files), seed=0)
    load_adapter(model, files)
    if double:
        model.double()
    import trl as untyped
    from datasets import Dataset

    trl: Any = untyped
    tensors = {
        "prompt_ids": torch.tensor(batch.prompts),
        "prompt_mask": torch.ones(len(batch.prompts), len(batch.prompts[0]), dtype=torch.long),
        "completion_ids": torch.tensor(batch.completions),
        "completion_mask": torch.ones(len(batch.completions), len(batch.completions[0]), dtype=torch.long),
        "old_per_token_logps": torch.tensor(batch.behaviour),
        "advantages": torch.tensor(batch.advantages),
        "num_items_in_batch": torch.tensor(float(sum(map(len, batch.completions)))),
    }
    losses: list[float] = []
    gradients: list[dict[str, Any]] = []

    class Replay(trl.GRPOTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            pass

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return dict(tensors)

        def _get_per_token_logps_and_entropies(
            self, model: Any, ids: Any, mask: Any, keep: int, *a: Any, **k: Any
        ) -> Any:
            if not double:
                return super()._get_per_token_logps_and_entropies(model, ids, mask, keep, *a, **k)
            # TRL's head computes in float32 whatever the model does; the loss on top of it is TRL's.
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1).logits[:, :-1]
            logprobs = logits.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
            return logprobs.gather(-1, ids[:, -keep:, None])[..., 0], entropy, None

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    class InTurns(TrainerCallback):  # type: ignore[misc]
        """The time from the beginning of a step to its end: forward, backward, optimiser."""

        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            pipe.recv()
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if not gradients:
                paused = time.perf_counter()
                gradients.append(_gradient(model))
                self.start += time.perf_counter() - paused

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pipe.send(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            max_steps=steps + 1,
            per_device_train_batch_size=SAMPLES,
            num_generations=SAMPLES,
            learning_rate=PARAMS["learning_rate"],
            max_grad_norm=PARAMS["max_grad_norm"],
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **given,
        )
        trainer = Replay(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [""] * SAMPLES}),
            processing_class=load_tokenizer(base),
            callbacks=[InTurns()],
        )
        assert trainer.args.gradient_checkpointing == given.get("gradient_checkpointing", True)
        trainer.remove_callback(PrinterCallback)
        pipe.send("ready")
        trainer.train()
    pipe.send((losses[0], gradients[0], _peak()))
