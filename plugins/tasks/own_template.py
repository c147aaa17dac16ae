"""A task of your own. Change what you like; `bascule tasks check THIS_FILE` says whether it holds.

This one asks for the number of vowels in a made-up word, and works as it stands:

    bascule run --task THIS_FILE --levers harness --max-gen 1

The file is loaded by the runtime and by the scoring process, and never by what agents write. It holds its own truths:
who can read it knows them, so keep it where agents cannot (they cannot, unless you copy it into a harness).
"""

import hashlib
from typing import Any

# What is asked for. People, authors of harnesses and agents read it.
DESCRIPTION = "Count the vowels (a, e, i, o, u) in a word. The answer is the number in plain digits and nothing else."

# The system prompt of the first harness, and the parameters of the general one. Instead you may bring a harness of your
# own: HARNESS = {"harness.py": "...", "manifest.json": "...", "system_prompt.md": "..."}.
PROMPT = "How many vowels has the word? Answer with the number only."
PARAMS = {"form": "chat", "extract": "last_integer", "max_tokens": 12}

SIZES = {"train": 200, "dev": 80, "sealed": 80}


def items(split: str) -> list[dict[str, Any]]:
    """The items of "train" (which agents may learn from), "dev" (which decides) and "sealed" (which is scored last).

    Each is a dict: "question" and "answer"; "id" and "group" if you like. Items of one group, such as two wordings of
    one question, must be in one split. The answers should be spread: a constant must not win.
    """
    first = {"train": 0, "dev": SIZES["train"], "sealed": SIZES["train"] + SIZES["dev"]}[split]
    words = made_up()[first : first + SIZES[split]]
    return [{"id": w, "question": f"{w}: how many vowels?", "answer": str(vowels)} for w, vowels in words]


def made_up() -> list[tuple[str, int]]:
    """All words, no two alike, with 1 to 8 vowels, equally often. The same ones each time: no clock, no chance."""
    found: dict[str, int] = {}
    for i in range(sum(SIZES.values())):
        random = hashlib.sha512(str(i).encode()).digest()
        vowels = i % 8 + 1
        letters = ["aeiou"[r % 5] for r in random[:vowels]] + ["bcdfghklmnprst"[r % 14] for r in random[8 : 12 + i % 5]]
        word = "".join(letter for _, letter in sorted(zip(random[32:], letters, strict=False)))
        found[word] = vowels
    return list(found.items())


def verify(item: dict[str, Any], answer: str) -> Any:
    """The verdict on one answer, a text. Return

    - True or False, or a number, the reward,
    - or a rank: the name of a level in LEVELS = ("wrong", "close", "right"), worst first,
    - or {"reward": 0.5, "passed": False, "well_formed": True},
    - or None if it has not the form that was asked for.

    Be strict: what agents can get points for they will find. An exception leaves the answer unscored.
    """
    text = answer.strip()
    if not (text.isascii() and text.isdigit()):
        return None
    return text == item["answer"]


# For step rewards, one for each call of the model, define this too; it is then used instead of verify for episodes.
# calls lists what happened: {"model": [texts]} or {"tool": name, "arguments": {}, "result": text, "error": None}.
#
# def verify_episode(item, answer, calls):
#     return {"reward": 1.0 if verify(item, answer) else 0.0, "steps": [0.0 for c in calls if "model" in c]}

# Tools of an episode, by name; what they remember lasts as long as the episode. The harness's manifest must name them.
#
# def tools(item):
#     return {"spell": lambda word: " ".join(word)}

# Rules that need no model; bascule scores them beside every run. item has no answer here.
BASELINES = {"half-the-letters": lambda item: str(len(item["question"].split(":")[0]) // 2)}

# What suits the task; whoever starts a run may say otherwise.
DEFAULTS = {"evaluation": {"train_groups": 16, "train_samples": 4}, "max_generations": 2}

LICENCE = "made by this file's code; do as you like"
SOURCE = "this file"
