"""GRPO by TRL: the same request as for ``grpo``, trained by TRL's ``GRPOTrainer`` from the logged tokens.

A second implementation to compare the loop with. TRL and torch are imported when an update begins.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bascule.plugins.algorithm import Credit, Group, Requires, Stream, Trained, TrainWork
from bascule.plugins.algorithms.grpo import Grpo
from bascule.plugins.extras import install_command
from bascule.plugins.hookspecs import hookimpl
from bascule.plugins.registry import Registry
from bascule.schemas.errors import ConfigError, TrainError
from bascule.trainers.params import TrainParams, scheduled_rate, train_params

if TYPE_CHECKING:
    from bascule.trainers.batch import Row

#: What TRL's trainer does otherwise than the loop, or not at all, has to be as it is here.
FIXED: dict[str, Any] = {
    "num_mini_batches": 1,
    "entropy_coef": 0.0,
    "lora_dropout": 0.0,
    "clip_ratio_c": None,
    "kl_estimator": "k3",
    "kl_reference": "base",
}
_NOT_READ = {"max_ratio"}


class TrlGrpo:
    """GRPO (arXiv 2402.03300) with the credit of ``grpo``, and its loss and optimiser step by TRL 1.16.

    TRL weighs by importance only what its own vLLM sampled, so the truncated weights of the recorded log-probabilities
    are part of the advantages that it is given, one for each token. The loss is then the loop's; at
    ``importance_sampling_level`` ``sequence`` its gradient is, where these weights are equal within a trajectory.

    A trajectory is a row of TRL's batch, with what tools and the environment said masked. TRL gives each row a mean of
    its own, so a trajectory of several rows is refused unless ``loss_type`` is ``dapo``.
    """

    name = "trl-grpo"
    version = "1"
    requires: Requires = Grpo.requires
    streams: frozenset[Stream] = frozenset()

    def __init__(self) -> None:
        self._grpo = Grpo()

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of ``grpo`` that TRL's trainer has as well."""
        return {k: v for k, v in self._grpo.defaults().items() if k not in _NOT_READ} | FIXED

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        """The advantages of ``grpo``."""
        return self._grpo.credit(groups, params)

    def train(self, work: TrainWork) -> Trained:
        """Make one update with ``GRPOTrainer``; without credit nothing changes but the count of updates.

        The state is a checkpoint of the loop's form: adapter, AdamW's moments, counters.

        Raises:
            ConfigError: TRL is not installed, a parameter asks for what TRL does not do, or there are several
                processes.
            TrainError: the data, the adapter or the state are not usable, or a figure is not finite.
        """
        started = time.perf_counter()
        params = _params(work)
        rows = _rows(self.credit(work.groups, work.params), work, params)

        import torch

        from bascule.trainers.base_model import load_model
        from bascule.trainers.batch import check_ids
        from bascule.trainers.checkpoint import Counters, read_checkpoint, write_checkpoint
        from bascule.trainers.forward import vocabulary
        from bascule.trainers.lora import adapter_files, attach_lora, load_adapter, with_adapter

        if work.adapter is not None:
            params = with_adapter(params, work.adapter)
        base = load_model(work.base)
        check_ids(work.trajectories, vocabulary(base))
        model = attach_lora(base, params, work.seed)
        if work.adapter is not None:
            load_adapter(model, work.adapter)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=params.learning_rate,
            betas=(params.adam_beta1, params.adam_beta2),
            eps=params.adam_epsilon,
            weight_decay=params.weight_decay,
            foreach=False,
        )
        done = 0
        if work.state is not None:
            before = read_checkpoint(model, None, optimizer, work.state, work.seed)
            if before.iteration != work.iteration:
                raise TrainError(f"Update {work.iteration} was asked for, but the next one is {before.iteration}.")
            done = before.optimizer_step
        figures = _run(model, optimizer, rows, work, params, done) if rows else {"optimizer_steps": 0.0}
        done += int(figures["optimizer_steps"])
        return Trained(
            files=adapter_files(model),
            state=write_checkpoint(model, None, optimizer, Counters(work.iteration + 1, done, work.seed)),
            metrics={**figures, "seconds": time.perf_counter() - started},
        )


@hookimpl
def bascule_register(registry: Registry) -> None:
    registry.algorithm(TrlGrpo())


def _params(work: TrainWork) -> TrainParams:
    """The loop's parameters, as far as TRL can follow them.

    Raises:
        ConfigError: it cannot.
    """
    params = train_params({**FIXED, **work.params})
    for name, value in FIXED.items():
        if name == "kl_estimator" and params.beta == 0:
            continue
        if getattr(params, name) != value:
            raise ConfigError(
                f"trl-grpo trains with {name} = {value!r} only, and {getattr(params, name)!r} was asked for.",
                next_step="Set it so, or choose the algorithm grpo.",
            )
    return params


def _rows(credit: Sequence[Credit], work: TrainWork, params: TrainParams) -> list[tuple[Row, float]]:
    """The training sequences and their advantages.

    Raises:
        TrainError: a trajectory is missing or has no log-probabilities, or TRL's batch cannot hold the rows.
    """
    from bascule.trainers.batch import units_of

    shares = [share for unit in units_of(credit, work.trajectories) for share in unit]
    forked = [s.trajectory for s in shares if len(s.rows) > 1]
    if forked and params.loss_type != "dapo":
        raise TrainError(
            f"Trajectory {forked[0]} has several training sequences, since a prompt does not continue the earlier one. "
            f"TRL would average each by itself under loss_type {params.loss_type}.",
            next_step="Set loss_type to dapo, or choose the algorithm grpo.",
        )
    rows = [(row, float(share.advantage[0])) for share in shares for row in share.rows]
    heats = sorted({row.temperature for row, _ in rows})
    if len(heats) > 1:
        raise TrainError(
            f"The batch was sampled at the temperatures {heats[0]:g} to {heats[-1]:g}; TRL computes all of it at one.",
            next_step="Let the harness sample at one temperature, or choose the algorithm grpo.",
        )
    return rows


def _run(
    model: Any, optimizer: Any, rows: Sequence[tuple[Row, float]], work: TrainWork, params: TrainParams, done: int
) -> dict[str, float]:
    """Let TRL take ``num_iterations`` optimiser steps on the rows; ``done`` were taken before.

    Raises:
        ConfigError: TRL is not installed, or there are several processes.
        TrainError: the sampler's policy is another one (``max_kl``), or a loss or a gradient is not finite.
    """
    import torch

    from bascule.trainers.base_model import IMPORTS, load_tokenizer
    from bascule.trainers.distributed import ranks

    if ranks().size > 1:
        raise ConfigError("trl-grpo trains in one process.", next_step="Start it without a launcher.")
    try:
        with IMPORTS:
            import trl as untyped
            from datasets import Dataset  # type: ignore[import-untyped]
            from transformers import PrinterCallback
    except ImportError as error:
        raise ConfigError(
            f"The algorithm trl-grpo needs TRL, which cannot be imported: {error}.",
            next_step=f"Choose the algorithm grpo, or install it: {install_command('trl')}",
        ) from error

    trl: Any = untyped
    tokens = sum(len(row.trained) for row, _ in rows)
    longest = max(len(row.tokens) for row, _ in rows)
    rows = [*rows] * 2 if len(rows) == 1 else rows  # TRL takes no group of one; twice the same is the same mean
    count = len(rows)
    fitting = max(d for d in range(1, count + 1) if count % d == 0 and (d == 1 or d * longest <= params.max_nodes))
    tokenizer = load_tokenizer(work.base)
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder,
            seed=work.seed % 2**32,
            max_steps=params.num_iterations,
            num_iterations=params.num_iterations,
            num_generations=count,
            per_device_train_batch_size=fitting,
            gradient_accumulation_steps=count // fitting,
            temperature=rows[0][0].temperature,
            loss_type=params.loss_type,
            max_completion_length=params.max_completion_length,
            importance_sampling_level=params.importance_sampling_level,
            epsilon=params.epsilon,
            epsilon_high=params.epsilon_high,
            delta=params.delta,
            beta=params.beta,
            max_grad_norm=params.max_grad_norm,
            bf16=False,  # the precision is the model's, as in the loop
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
        )
        factors = [scheduled_rate(params, done + i) / params.learning_rate for i in range(params.num_iterations)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: factors[min(i, len(factors) - 1)])
        trainer = _replaying(trl.GRPOTrainer, rows, params, tokenizer.pad_token_id or 0)(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=tokenizer,
            optimizers=(optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    loss = math.fsum(trainer.losses[-(count // fitting) :])
    norm = float(logged[-1]["grad_norm"])
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainError(
            f"TRL's loss is {loss} and the norm of its gradient {norm}.",
            next_step="Lower learning_rate.",
            figures={"loss": loss, "grad_norm": norm},
        )
    return {
        "loss": loss,
        "kl": trainer.kl,
        "kl_reference": float(logged[-1].get("kl", 0.0)),
        "clip_fraction": float(logged[-1]["clip_ratio/region_mean"]),
        "entropy": float(logged[-1]["entropy"]),
        "grad_norm": norm,
        "learning_rate": params.learning_rate * factors[-1],
        "trained_tokens": float(tokens),
        "optimizer_steps": float(params.num_iterations),
    }


def _replaying(trainer: Any, rows: Sequence[tuple[Row, float]], params: TrainParams, pad: int) -> Any:
    """A class of TRL's trainer that takes the rows for what it has generated, and tells nobody that it runs.

    Its ``losses`` are those of the micro-batches, its ``kl`` is the k3 estimate of KL(sampler || policy) before the
    update.
    """
    import torch

    from bascule.trainers.step import check_kl

    class Replay(trainer):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            self.losses: list[float] = []
            self.kl = 0.0
            super().__init__(**given)

        def _send_telemetry(self) -> None:
            pass

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = _batch(rows, pad, self.accelerator.device)
            sampled = batch["tool_mask"]
            old = self._logprobs(batch)
            drift = torch.where(sampled > 0, old - batch.pop("behaviour"), 0.0)
            self.kl = float((torch.expm1(drift) - drift).sum() / sampled.sum())
            check_kl(self.kl, params)
            weights = torch.exp(drift).clamp(max=params.importance_cap)
            batch |= {"old_per_token_logps": old, "advantages": batch["advantages"][:, None] * weights}
            if params.beta > 0:
                with self.model.disable_adapter():
                    batch["ref_per_token_logps"] = self._logprobs(batch)
            return batch

        def _logprobs(self, batch: dict[str, Any]) -> Any:
            """[B, T] of the completions' tokens, without gradient and without dropout."""
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            width, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
            self.model.eval()
            with torch.no_grad():
                found = self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)[0]
            self.model.train()
            return found

        def training_step(self, *given: Any) -> Any:
            loss = super().training_step(*given)
            self.losses.append(float(loss))
            return loss

    return Replay


def _batch(rows: Sequence[tuple[Row, float]], pad: int, device: Any) -> dict[str, Any]:
    """TRL's generation batch of B rows: prompts of P tokens, and completions padded on the right to T; with the
    sampler's log-probabilities [B, T] as ``behaviour``.

    The prompt is as much of a row as comes before the first sampled token of all rows; the rest of a longer prompt
    stands in the completion and is masked like a tool's output. So nothing is padded on the left, and every token has
    its own position.
    """
    import torch

    start = min(row.trained[0] for row, _ in rows)
    width = max(row.trained[-1] + 1 for row, _ in rows) - start
    shape = (len(rows), width)
    prompts = torch.tensor([row.tokens[:start] for row, _ in rows], device=device)
    ids = torch.full(shape, pad, device=device)
    mask, sampled = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, device=device)
    behaviour = torch.zeros(shape, device=device)
    for i, (row, _) in enumerate(rows):
        rest = row.tokens[start : row.trained[-1] + 1]
        ids[i, : len(rest)] = torch.tensor(rest, device=device)
        mask[i, : len(rest)] = 1
        at = torch.tensor(row.trained, device=device) - start
        sampled[i, at] = 1
        behaviour[i, at] = torch.tensor(row.behaviour, device=device)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": ids,
        "completion_mask": mask,
        "tool_mask": sampled,
        "behaviour": behaviour,
        "advantages": torch.tensor([advantage for _, advantage in rows], device=device),
        "num_items_in_batch": sampled.sum(),
    }
