"""The tree pass is the plain pass of many architectures; the others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.plugins.algorithm import Credit
from bascule.schemas.errors import ConfigError
from bascule.trainers import learner
from bascule.trainers.batch import micro_batches, units_of, weighed
from bascule.trainers.forward import check_base, token_figures
from bascule.trainers.lora import set_adapter_tensors
from bascule.trainers.params import TrainParams
from tests.oracles import within
from tests.trainers.architectures import KINDS, tiny
from tests.trainers.bandit import make_job, train
from tests.trainers.conversations import conversations, plain
from tests.trainers.gradients import EXACT, adapter, apart, gradients


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
    monkeypatch.setattr(learner, "KEEP_BYTES", 0)
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
