"""Whether base model, adapter and engine fit into memory, and what a run writes onto the disk."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bascule.plugins.loader import plugins
from bascule.plugins.params import read_params
from bascule.plugins.wheels import cache_folder
from bascule.runtime.cli.configuration import check_algorithms
from bascule.runtime.doctor.configured import CONVERTED_BYTES, WHEEL_BYTES
from bascule.runtime.doctor.endpoints import wanted
from bascule.runtime.doctor.finding import Asked, Finding, Outcome, embeds, in_gib, learns, untold
from bascule.runtime.doctor.machine import check_place, free_memory
from bascule.runtime.engines.remote import LOCAL
from bascule.runtime.engines.transformers import Params
from bascule.runtime.services.inference import engine_params
from bascule.runtime.world import World
from bascule.schemas.errors import BasculeError, ConfigError
from bascule.schemas.run import RunConfig
from bascule.trainers import memory
from bascule.trainers.base_model import present_model
from bascule.trainers.params import TrainParams
from bascule.trainers.shapes import Shape, known_shape, shape_of_folder

#: Tokens of an episode that vLLM's cache is estimated for; where the model's context is shorter, that.
LENGTH = 2048
#: Bytes of an episode in the log, with its score; an approximation of short answers with their log-probabilities.
EPISODE_BYTES = 8 << 10
#: Of the log's own files and the reports.
HOME_BYTES = 64 << 20


def check_memory(asked: Asked) -> Iterator[Finding]:
    """Estimate what engine and trainer take, and hold it against what is free on the GPU or in memory."""
    assert asked.config is not None
    config, cuda = asked.config, asked.gpu_free is not None
    try:
        shape = _shape(config)
        jobs = check_algorithms(World(plugins(), config)) if learns(config) else {}
        limits, elsewhere = _limits(config), _elsewhere(config)
    except BasculeError as e:
        yield untold("memory", e)
        return
    if shape is None:
        what = f"the sizes of {config.model} are not known here, so nothing is estimated"
        yield Finding(about="memory", outcome="skipped", found=what, next_step="Name a folder with a config.json.")
        return
    free = asked.gpu_free if asked.gpu_free is not None else free_memory()
    where = "the GPU" if cuda else "memory"
    training = _largest_job(shape, jobs, cuda=cuda)
    if training is not None:
        yield Finding(
            about="memory: training", outcome="ok", found=_told(training[1], training[0]), figures=_figures(training[1])
        )
    serving = _serving(config, shape, jobs, limits, cuda=cuda)
    if serving is not None:
        yield Finding(
            about=f"memory: {config.engine.name}", outcome="ok", found=_told(serving), figures=_figures(serving)
        )
    if elsewhere:
        serving = None
    need = _together(config, serving, training[1] if training else None)
    if need is None:
        return
    if config.engine.name == "vllm" and serving is not None and training is not None:
        asleep = memory.on_one_gpu(serving, training[1])
        what = (
            f"{in_gib(asleep)} would do if something put vLLM to sleep while the trainer works, which a run does not. "
            "Of a GPU it takes nine tenths unless --gpu-memory-utilization says otherwise"
        )
        yield Finding(about="memory: vllm asleep", outcome="ok", found=what, figures={"need": asleep})
    yield _judged(need, free, where)


def _shape(config: RunConfig) -> Shape | None:
    """The sizes of the model: from its folder, else by its name."""
    try:
        folder = present_model(config.model)
    except ConfigError:
        folder = None
    try:
        return shape_of_folder(folder) if folder is not None else known_shape(config.model)
    except ConfigError:
        return known_shape(config.model)


def _largest_job(shape: Shape, jobs: Mapping[str, TrainParams], *, cuda: bool) -> tuple[str, memory.Memory] | None:
    """The algorithm whose training takes the most, and what it takes."""
    found: dict[str, memory.Memory] = {}
    for name, p in jobs.items():
        try:
            adapter = memory.adapter_size(shape, p.lora_r, p.lora_target_modules, p.lora_target_parameters)
        except ConfigError:
            continue  # refused by its name when a run starts
        found[f"{name}, rank {p.lora_r}"] = memory.training_memory(
            shape, adapter, p.max_nodes, 2 if cuda else 4, cuda=cuda
        )
    return max(found.items(), key=lambda job: job[1].total) if found else None


def _limits(config: RunConfig) -> Params | None:
    """The parameters of the embedded engine; None for another one.

    Raises:
        ConfigError: one is unknown or of a wrong type.
    """
    return (
        read_params(engine_params(config, config.engine), Params, "The engine 'transformers'")
        if embeds(config)
        else None
    )


def _elsewhere(config: RunConfig) -> bool:
    """Whether all servers of vLLM are on other machines.

    Raises:
        ConfigError: the parameters that name them are not usable.
    """
    if config.engine.name != "vllm":
        return False
    asked = [one.url for one in wanted(config) if "engine" in one.who]
    return bool(asked) and not any(urlsplit(url).hostname in LOCAL for url in asked)


def _serving(
    config: RunConfig, shape: Shape, jobs: Mapping[str, TrainParams], limits: Params | None, *, cuda: bool
) -> memory.Memory | None:
    """What the engine takes; None for one that loads no model."""
    if limits is not None:
        return memory.embedded_memory(
            shape,
            rows=limits.rows,
            tokens=limits.tokens,
            kv_mib=limits.kv_mib,
            prefix_tokens=limits.prefix_tokens,
            merged=limits.merged_adapters if jobs else 0,
            element=2 if cuda else 4,
            cuda=cuda,
        )
    if config.engine.name != "vllm":
        return None
    adapters = [memory.adapter_size(shape, p.lora_r) for p in jobs.values()]
    largest = max(adapters, default=memory.Adapter(0, 0))
    length = min(shape.context, LENGTH)
    return memory.vllm_memory(shape, rows=config.concurrency, length=length, adapter=largest, adapters=2)


def _together(config: RunConfig, serving: memory.Memory | None, training: memory.Memory | None) -> int | None:
    """Bytes that this machine needs at one time; None for nothing."""
    if config.engine.name == "vllm" and serving is not None and training is not None:
        return serving.total + training.total
    if serving is not None and training is not None:
        return memory.in_one_process(serving, training)
    alone = serving or training
    return alone.total if alone is not None else None


def _judged(need: int, free: int, where: str) -> Finding:
    said = memory.verdict(need, free)
    found = f"{in_gib(need)} at one time, {in_gib(free)} free in {where}: {said}"
    step = (
        "Choose a smaller model, rank (lora_r) or micro-batch (max_nodes), or lower the engine's limits (rows, kv_mib)."
        if said != "fits"
        else ""
    )
    outcomes: dict[memory.Verdict, Outcome] = {"fits": "ok", "tight": "warns", "does not fit": "fails"}
    figures = {"need": need, "free": free}
    return Finding(about="memory", outcome=outcomes[said], found=found, next_step=step, figures=figures)


def _told(parts: memory.Memory, name: str = "") -> str:
    each = ", ".join(f"{n} {in_gib(size)}" for n, size in _figures(parts).items() if size and n != "total")
    return f"{name + ': ' if name else ''}some {in_gib(parts.total)} ({each})"


def _figures(parts: memory.Memory) -> dict[str, Any]:
    return {**msgspec.structs.asdict(parts), "total": parts.total}


def check_disk(asked: Asked) -> Iterator[Finding]:
    """Whether home, cache and temporary folder can be written and have room."""
    config = asked.config
    try:
        need = _home_bytes(config)
    except BasculeError as e:
        need = HOME_BYTES
        yield untold("disk: a run", e)
    yield check_place("disk: home", Path(asked.home), need, "--home or BASCULE_HOME")
    try:
        cache = cache_folder()
    except OSError as e:
        step = "Name another folder with BASCULE_CACHE."
        yield Finding(about="disk: cache", outcome="fails", found=f"cannot be made: {e}", next_step=step)
        return
    need = 1 << 20
    if config is not None and (embeds(config) or learns(config)):
        with contextlib.suppress(BasculeError):  # said where the model is looked at
            need += 0 if present_model(config.model) is not None else WHEEL_BYTES * 2 + CONVERTED_BYTES
    yield check_place("disk: cache", cache, need, "BASCULE_CACHE")
    yield check_place("disk: temporary", Path(tempfile.gettempdir()), 64 << 20, "TMPDIR")


def _home_bytes(config: RunConfig | None) -> int:
    """An estimate of what a run writes into its home: its episodes, an adapter a generation, one checkpoint."""
    if config is None:
        return HOME_BYTES
    measured = (
        config.evaluation.dev_examples or 250
    ) + config.evaluation.train_groups * config.evaluation.train_samples
    size = HOME_BYTES + EPISODE_BYTES * measured * (config.max_generations + 2)
    shape = _shape(config) if learns(config) else None
    if shape is not None:
        jobs = check_algorithms(World(plugins(), config))
        size += (
            EPISODE_BYTES
            * config.max_generations
            * max((p.steps * p.groups * p.num_generations for p in jobs.values()), default=0)
        )
        rank = max((p.lora_r for p in jobs.values()), default=0)
        adapter = memory.adapter_size(shape, rank).parameters * memory.ADAPTER_BYTES
        size += adapter * (config.max_generations + 3)
    return size
