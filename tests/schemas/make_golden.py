"""Writes the golden payload of each (type, version) that has none: ``python -m tests.schemas.make_golden``.

An existing file is never written again: it stands for what is in logs. Every field of every struct is set, to something
else than its default, so that no field can be taken out, renamed or read otherwise without a test that notices.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from bascule.schemas import events as ev
from bascule.schemas import subjects
from bascule.schemas.budget import Bounds, BudgetConfig, MachinePrice, Price
from bascule.schemas.codec import decode
from bascule.schemas.decision import Evidence, Option
from bascule.schemas.envelope import Envelope, Producer
from bascule.schemas.landscape import (
    Histogram,
    Interval,
    Measured,
    MeasuredEvaluation,
    RewardLandscape,
    Spread,
    WorkMeasured,
)
from bascule.schemas.run import EvaluationConfig, GateConfig, PluginChoice, PluginPin, RunConfig
from bascule.schemas.sandbox import Canary, SandboxConfig, SandboxReport
from bascule.schemas.trajectory import (
    REFUSED,
    EpisodeError,
    ModelCall,
    Note,
    Output,
    Sampling,
    Scored,
    ToolCall,
    Trajectory,
    Unscored,
    pack_floats,
    pack_ids,
)

GOLDEN = Path(__file__).with_name("golden")
RUN = "arith-1"
MEASURED = Measured(seconds=0.731)
WORK = WorkMeasured(seconds=0.731, share=0.25, device="NVIDIA H200")
SAMPLING = Sampling(temperature=0.5, max_tokens=6, stop=("\n",))
BLOB = ev.BlobRef(
    sha256="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", size=70001, media="application/json"
)
PIN = PluginPin(
    kind="task",
    name="arith",
    version="1",
    distribution="bascule (tasks) 0.1.0",
    hash="5f3ba6aeba3fc4eedbc2b8ea4e8d1a0c",
)
CONFIG = RunConfig(
    task=PluginChoice(name="arith", params={"digits": 2}),
    second=PluginChoice(name="task", params={"strict": True}),
    model="smollm2-360m-instruct",
    engine=PluginChoice(name="constant", params={"text": "7"}),
    policy=PluginChoice(name="rules", params={"patience": 2}),
    author=PluginChoice(name="operators", params={"order": ["form", "shots"]}),
    levers=("harness",),
    max_generations=3,
    seed=7,
    evaluation=EvaluationConfig(
        dev_examples=20,
        sealed_examples=30,
        train_groups=4,
        train_samples=2,
        train_temperature=0.9,
        perturbed=10,
        regression=12,
        fresh_dev=15,
    ),
    gate=GateConfig(alpha=0.01, guard="thresholdout", margin=0.02),
    algorithms={"grpo": {"steps": 3, "learning_rate": 0.01}},
    shard_size=16,
    concurrency=64,
    threads=2,
    sandbox=SandboxConfig(require=("files", "network"), unsafe=True),
    harness={"system_prompt.md": "Answer with the number.\n"},
    budget=BudgetConfig(
        generations=3,
        rollouts=10_000,
        tokens=50_000,
        seconds=3600.0,
        gpu_seconds=600.5,
        dollars=2.5,
        levers={
            "weights": Bounds(
                generations=2, rollouts=9_000, tokens=40_000, seconds=1800.0, gpu_seconds=500.5, dollars=1.5
            )
        },
    ),
    prices={"claude": Price(input=5.0, output=25.0, cache_read=0.5, cache_write=6.25)},
    machine=MachinePrice(gpu_hour=4.0, cpu_hour=0.2),
)
SANDBOX = SandboxReport(
    kind="layered",
    mechanisms=("own root", "landlock 7"),
    missing=("user namespace: not permitted",),
    holds=("files",),
    canaries=(Canary(name="read-planted-secret", layer="files", held=True, control=True, by="own root"),),
    uid=61000,
)
ERROR = EpisodeError(kind="crash", message="The harness exited with status 1 before it answered.")
CALL = ModelCall(
    kind="completion",
    asked="d2f1a8c6b4e09375",
    prompt_ids=pack_ids([1, 2, 49151]),
    outputs=(
        Output(token_ids=pack_ids([216, 34]), logprobs=pack_floats([-0.125, -2.5]), text=" 25", finish_reason="length"),
    ),
    sampling=SAMPLING,
    seed=281474976710655,
    adapter="arith-1.g02-i001",
    usage=(3, 2),
)
PROBE = ev.AdapterProbe(
    ids=pack_ids([1, 2, 49151]), logprobs=pack_floats([-0.125, -2.5]), base=pack_floats([-0.25, -2.0]), dtype="float32"
)
SERVED = ev.ServedProbe(tokens=2, largest=1e-05, bound=0.002, from_base=0.5, dtype="float32", replicas=2)
TOOLS = (
    ToolCall(name="lookup", arguments='{"row":3}', result='"zwölf"', error="refused"),
    Note(text=f"{REFUSED}it is too long", refused="0123456789abcdef0123456789abcdef"),
)
INTERVAL = Interval(0.051, 0.274)
LANDSCAPE = RewardLandscape(
    groups=20,
    samples=40,
    unscored=1,
    score=0.12,
    score_interval=INTERVAL,
    mean=0.123,
    variance=0.108,
    skew=2.3,
    success_rate=0.1230769230769231,
    pass_rates=(14, 1, 2, 1, 1, 1),
    informative=0.25,
    format_failures=0.05,
    errors=0.025,
    prompt_tokens=31.5,
    output_tokens=3.25,
    distinct_rewards=2,
    step_rewards=30,
    density=0.125,
    density_interval=INTERVAL,
    mean_interval=INTERVAL,
    success_interval=INTERVAL,
    informative_interval=INTERVAL,
    step_interval=INTERVAL,
    step_density=0.5,
    step_calls=60,
    tokens=Spread(34.75, 51.0),
    rewards=Histogram((0.0, 0.5, 1.0), (35, 4)),
    ess=0.91,
    kl_to_base=0.43,
    regression_drop=0.015,
)
PAIRED = ev.PairedFigures(pairs=100, difference=0.02, wins=5, losses=3, p_better=0.36, p_worse=0.86)
FIGURES = ev.GateFigures(
    test="mcnemar-exact",
    score=0.74,
    score_interval=INTERVAL,
    parent_score=0.12,
    wins=95,
    losses=2,
    p=1.2e-28,
    alpha=0.05,
    reason="better on dev: 95 better and 2 worse, p = 1.2e-28",
    guard=ev.GuardFigures(kind="ladder", difference=0.62, threshold=0.18, reported=0.74),
    cheaper=ev.CheaperFigures(saved=0.3, margin=0.02, p=0.001),
    regression=PAIRED,
    perturbed=PAIRED,
    second=ev.SecondFigures(**msgspec.structs.asdict(PAIRED), divergence=0.6, interval=INTERVAL),
)
OPTIONS = (
    Option(lever="weights", algorithm="grpo", feasible=False, score=0.4, reasons=("informative groups .02 < .1",)),
)
EVIDENCE = (Evidence(name="train.score", value=0.12, event="eval.g00-train.completed"),)
SEALED = ev.SealedReport(
    before=0.12,
    before_interval=INTERVAL,
    after=0.74,
    after_interval=INTERVAL,
    wins=95,
    losses=2,
    p=1e-28,
    n=150,
    test="mcnemar-exact",
)
FILES = {"adapter_model.safetensors": BLOB}
DIGEST = "0c3d9f2b7a6e5d4c3b2a190817263544"


def full() -> dict[str, tuple[str, ev.Data]]:
    """Subject and data by file name without suffix, ``<type>-v<version>[-<variant>]``."""
    s, r, name = subjects, RUN, "g01-train-0003-n1"
    trajectory = ev.TrajectoryLogged(
        trajectory=name,
        evaluation="g01-train",
        example="train-17",
        position=3,
        sample=1,
        answer="25",
        error=ERROR,
        prompt_tokens=3,
        output_tokens=2,
        measured=WORK,
        body=Trajectory(steps=(CALL, *TOOLS), answer="25", error=ERROR),
        blob=BLOB,
    )
    scored = ev.TrajectoryScored(
        trajectory=name,
        evaluation="g01-train",
        position=3,
        sample=1,
        verdict=Scored(reward=0.75, passed=True, well_formed=False, steps=(0.25, 0.5)),
        measured=WORK,
        second=Unscored(reason="The scorer failed."),
    )
    unscored = msgspec.structs.replace(scored, verdict=Unscored(reason="The scoring process was stopped."))
    found: list[tuple[str, ev.Data]] = [
        (
            s.run_started(r),
            ev.RunStarted(
                config=CONFIG,
                task_version="1",
                task_digest=DIGEST,
                train=300,
                dev=150,
                sealed=150,
                model_digest=DIGEST,
                plugins=(PIN,),
            ),
        ),
        (
            s.harness_outcome(r, 1),
            ev.HarnessProposed(
                generation=1,
                digest=DIGEST,
                files={"harness.py": "def solve(example, model, tools, context):\n    return 'ß'\n"},
                author="operators",
                edit="form=completion",
                parent=DIGEST[::-1],
            ),
        ),
        (s.harness_outcome(r, 2), ev.AuthorFailed(generation=2, author="operators", reason="Nothing is left to try.")),
        (
            s.candidate_proposed(r, 1),
            ev.CandidateProposed(
                generation=1, harness=DIGEST, adapter="g01-i002", parent=0, lever="weights", algorithm="grpo"
            ),
        ),
        (
            s.episodes_requested(r, "g01-train", 2),
            ev.EpisodesRequested(
                evaluation="g01-train",
                purpose="landscape",
                generation=1,
                split="train",
                shard=2,
                shards=3,
                positions=(3, 5),
                examples=("train-17", "train-4"),
                samples=2,
                sampling=SAMPLING,
                seed=1234567,
                harness=DIGEST,
                adapter="g01-i002",
                engine=PluginChoice(name="constant", params={"text": "7"}),
                perturbed=True,
            ),
        ),
        (s.trajectory_logged(r, name), trajectory),
        (s.trajectory_scored(r, name), scored),
        (s.trajectory_scored(r, name), unscored),
        (
            s.evaluation_completed(r, "g01-train"),
            ev.EvaluationCompleted(
                evaluation="g01-train",
                purpose="landscape",
                generation=1,
                split="train",
                landscape=LANDSCAPE,
                measured=MeasuredEvaluation(seconds=0.731, rollout=Spread(0.018, 0.025)),
            ),
        ),
        (
            s.candidate_gate(r, 1),
            ev.CandidatePromoted(generation=1, over=0, figures=FIGURES, gate_version="3"),
        ),
        (s.candidate_gate(r, 2), ev.CandidateRejected(generation=2, over=1, figures=FIGURES, gate_version="3")),
        (
            s.lever_chosen(r, 1),
            ev.LeverChosen(
                generation=1,
                lever="weights",
                algorithm="grpo",
                params={"steps": 3, "beta": 0.0},
                parent=0,
                policy="rules",
                policy_version="1",
                reasons=("the landscape is informative",),
                options=OPTIONS,
                evidence=EVIDENCE,
            ),
        ),
        (
            s.call_outcome(r, "g01-author", 0),
            ev.ModelCalled(
                session="g01-author",
                ordinal=1,
                model="m",
                request={"messages": [{"role": "user", "content": "ü"}]},
                answer={"text": "x"},
                input_tokens=11,
                output_tokens=2,
                measured=MEASURED,
                cache_read_tokens=40,
                cache_write_tokens=7,
                stop_reason="tool_use",
                request_blob=BLOB,
            ),
        ),
        (
            s.call_outcome(r, "g01-author", 1),
            ev.ToolCalled(
                session="g01-author",
                ordinal=2,
                name="search",
                arguments={"q": [1, 2.5, True]},
                result="found",
                error="late",
                measured=WORK,
                trial=ev.TrialCost(rollouts=8, prompt_tokens=96, output_tokens=24),
            ),
        ),
        (
            s.train_requested(r, 1),
            ev.TrainRequested(
                generation=1,
                algorithm="grpo",
                algorithm_version="1",
                params={"lora_r": 16},
                iterations=3,
                groups=6,
                samples=4,
                temperature=0.9,
                parent=0,
                harness=DIGEST,
                adapter="g00-i002",
                logged="g00-train",
                seed=99,
            ),
        ),
        (
            s.train_started(r, 1, 2),
            ev.TrainStarted(generation=1, attempt=2, resumed_after=1, threads=2, versions={"torch": "2.13.0"}),
        ),
        (
            s.adapter_checkpointed(r, 1, 2),
            ev.AdapterCheckpointed(
                generation=1,
                iteration=2,
                attempt=1,
                adapter="g01-i002",
                files=FILES,
                sha256=BLOB.sha256,
                state=BLOB,
                data_digest=DIGEST,
                metrics={"loss": -0.0123, "kl": 1e-05},
                measured=MEASURED,
                base=DIGEST,
                probe=PROBE,
            ),
        ),
        (
            s.train_outcome(r, 1),
            ev.AdapterPublished(
                generation=1,
                adapter="g01-i002",
                files=FILES,
                sha256=BLOB.sha256,
                parent_adapter="g00-i002",
                iterations=3,
                data_digest=DIGEST,
                metrics={"loss": -0.0123, "kl": 1e-05},
                base=DIGEST,
            ),
        ),
        (
            s.train_outcome(r, 2),
            ev.TrainFailed(generation=2, attempt=1, reason="no group", figures={"groups": 0.5}, measured=MEASURED),
        ),
        (
            s.adapter_served(r, "g01-i002"),
            ev.AdapterServed(adapter="g01-i002", sha256=BLOB.sha256, engine="vllm", probe=SERVED),
        ),
        (
            s.sandbox_probed(r, "rollout", "1a2b3c"),
            ev.SandboxProbed(service="rollout", worker="1a2b3c", report=SANDBOX),
        ),
        (
            s.ablation_requested(r, "constant"),
            ev.AblationRequested(name="constant", arm="constant-engine", generation=1, answer="7"),
        ),
        (s.run_paused(r, 1), ev.RunPaused(reason="somebody asked")),
        (s.run_resumed(r, 1), ev.RunResumed()),
        (s.run_rolled_back(r, 1), ev.RunRolledBack(generation=2, reason="somebody asked")),
        (s.run_end(r), ev.RunCancelled(reason="somebody asked")),
        (s.run_end(r), ev.RunCompleted(best=1, generations=3, reason="max_generations", sealed=SEALED)),
        (s.run_end(r), ev.RunFailed(service="meta", reason="The first harness is not usable.")),
        (
            s.subject(r, "run", "fork", "forked"),
            ev.RunForked(
                run="arith-0",
                count=17,
                head=DIGEST,
                step=1,
                config=CONFIG,
                plugins=(PIN,),
                changes={"gate.alpha": 0.01},
            ),
        ),
        (
            s.subject(r, "run", "runtime-001", "runtime_changed"),
            ev.RuntimeChanged(plugins=(PIN,), changes=("bascule 0.1.0 to 0.2.0",)),
        ),
        (s.subject(r, "log", "checkpoint-000017", "checkpointed"), ev.LogCheckpointed(count=17, head=DIGEST)),
        (s.subject(r, "blob", BLOB.sha256[:40], "erased"), ev.BlobErased(sha256=BLOB.sha256, reason="asked to")),
    ]
    out: dict[str, tuple[str, ev.Data]] = {}
    for subject, data in found:
        variant = "-unscored" if data is unscored else ""
        out[f"{data.TYPE}-v{data.VERSION}{variant}"] = (subject, data)
    return out


def payload(subject: str, data: ev.Data) -> bytes:
    """Bytes as the log holds them, with every field of the envelope set."""
    return msgspec.json.encode(
        Envelope(
            id=subjects.event_id(subject),
            type=data.TYPE,
            source="/bascule/meta",
            subject=subject,
            time="2026-11-21T10:50:12.345678Z",
            run=RUN,
            step=1,
            schemaversion=data.VERSION,
            producer=Producer(service="meta", version="0.1.0", hash=DIGEST),
            data=msgspec.Raw(msgspec.json.encode(data)),
            causationid=subjects.event_id(subjects.run_started(RUN)),
            correlationid=subjects.event_id(subjects.run_started(RUN)),
            attempt=1,
            origin="whatif",
        )
    )


def main() -> int:
    GOLDEN.mkdir(exist_ok=True)
    for name, (subject, data) in full().items():
        path = GOLDEN / f"{name}.json"
        if path.exists():
            continue
        content = payload(subject, data)
        decode(1, subject, content)
        path.write_bytes(content)
        sys.stdout.write(f"{path.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
