"""The reference harness of the task rooms: one growing conversation, in which each reply of the model is one action.

The conversation is only ever added to, and the replies stand in it as they were given. Parameters:

- ``turns``: replies before it gives up; ``max_tokens``: of each.
- ``temperature``: None leaves it to the run.
- ``hint``: whether the tools that are to be had here stand in every message, or only in the first one.
"""

import re
from typing import Any

FIRST = {"go": "direction", "unlock": "direction", "take": "thing"}
WAYS = {"north": "n", "east": "e", "south": "s", "west": "w"}


def action(reply: str) -> tuple[str, dict[str, str]] | None:
    """The first action in a reply: ``go n``, ``take red key``, ``unlock e``, ``place`` or ``look``."""
    found = re.search(r"\b(look|go|take|unlock|place)\b[ \t]*([^\n.,!:;()]*)", reply.lower())
    if found is None:
        return None
    tool, rest = found[1], found[2].strip()
    if tool not in FIRST:
        return tool, {}
    if tool == "take":
        return tool, {"thing": rest.removeprefix("the ").strip()}
    word = rest.split()[0] if rest else ""
    return tool, {FIRST[tool]: WAYS.get(word, word)}


def solve(example: dict[str, Any], model: Any, tools: Any, context: Any) -> str:
    """Explore until the goal is reached or the turns are used up."""
    params = context.params
    conversation = [
        {"role": "system", "content": context.system_prompt.strip()},
        {"role": "user", "content": example["question"]},
    ]
    for _ in range(params.get("turns", 24)):
        limits = {"max_tokens": params.get("max_tokens", 8), "temperature": params.get("temperature")}
        try:
            reply = model.chat(conversation, **limits)[0].text
        except Exception as e:  # the conversation is longer than the model's context: what was done counts
            context.note(f"no further turn: {e}")
            break
        wanted = action(reply)
        if wanted is None:
            said = "That is no action."
        else:
            try:
                said = tools.call(wanted[0], **wanted[1])
            except Exception as e:  # the tool's own words: it is not to be had here
                said = str(e)
        if "You are done." in said:
            return "done"
        if not params.get("hint", True):
            said = said.partition(" tools:")[0]
        conversation += [{"role": "assistant", "content": reply}, {"role": "user", "content": said}]
    return "gave up"
