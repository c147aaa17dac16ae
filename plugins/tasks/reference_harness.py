"""The reference harness: prompt, extraction, retries and votes, steered by ``params`` of the manifest.

It computes no answer by itself and knows no task.

- ``form``: ``chat`` or ``completion``.
- ``shots``: a list of {"question", "answer"}: earlier turns of a chat, or lines before the question. The question that
  is asked is never among them.
- ``instruction``: where the system prompt goes: ``first`` (the system message, or a header line), ``question`` (in
  front of the question) or ``none``.
- ``extract``: ``whole``, ``first_line``, ``last_line``, ``first_integer``, ``last_integer``, {"choice": [...]} or
  {"last_choice": [...]}. A reply that it finds nothing in is answered as it stands.
- ``retries``: further attempts when nothing was found; ``votes``: samples per attempt, of which the majority counts.
- ``max_tokens``, ``stop``: limits of a reply; ``temperature`` of votes and retries, which greedy sampling would make
  all alike.
"""

import re
from collections import Counter
from typing import Any


def messages(question: str, instruction: str, params: dict[str, Any]) -> list[dict[str, str]]:
    """The chat prompt."""
    turns = []
    if instruction and params.get("instruction", "first") == "first":
        turns.append({"role": "system", "content": instruction})
    for shot in shots(question, params):
        turns.append({"role": "user", "content": shot["question"]})
        turns.append({"role": "assistant", "content": shot["answer"]})
    turns.append({"role": "user", "content": asked(question, instruction, params)})
    return turns


def prompt(question: str, instruction: str, params: dict[str, Any]) -> str:
    """The completion prompt; it ends with the question, so that the model's first token is the answer's blank."""
    lines = [f"{shot['question']} {shot['answer']}" for shot in shots(question, params)]
    if instruction and params.get("instruction", "first") == "first":
        lines.insert(0, instruction)
    return "\n".join([*lines, asked(question, instruction, params)])


def asked(question: str, instruction: str, params: dict[str, Any]) -> str:
    """The question itself, with the instruction in front of it where the parameters say so."""
    in_front = instruction and params.get("instruction", "first") == "question"
    return f"{instruction}\n{question}" if in_front else question


def shots(question: str, params: dict[str, Any]) -> list[dict[str, str]]:
    """The worked examples, without the question that is asked."""
    return [shot for shot in params.get("shots", []) if shot["question"] != question]


def extract(text: str, how: str | dict[str, list[str]]) -> str | None:
    """The answer in a reply, or None if there is none of the form that is looked for."""
    if isinstance(how, dict):
        return choice(text, how)
    if how.endswith("_integer"):
        found = integers(text)
        return (found[0] if how == "first_integer" else found[-1]) if found else None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    return {"whole": text.strip(), "first_line": lines[0], "last_line": lines[-1]}[how]


def choice(text: str, how: dict[str, list[str]]) -> str | None:
    """The first or last of some words in a reply, spelt as in the list."""
    (order, words), *_ = how.items()
    spelt = {word.lower(): word for word in words}
    longest_first = sorted(words, key=len, reverse=True)
    found = re.findall(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", text, re.IGNORECASE)
    return spelt[found[-1 if order == "last_choice" else 0].lower()] if found else None


def integers(text: str) -> list[str]:
    """The integers in a reply in plain decimal form; a minus after a digit or letter is not a sign."""
    found = []
    for sign, whole, fraction in re.findall(r"((?<!\w)-)?(?<!\d)(?<!\d\.)(\d+)((?:\.\d+)?)", text, re.ASCII):
        if not fraction.strip(".0"):
            digits = whole.lstrip("0") or "0"
            found.append(sign + digits if digits != "0" else digits)
    return found


def solve(example: dict[str, Any], model: Any, tools: Any, context: Any) -> str:
    """Answer one example."""
    params = context.params
    question = example["question"]
    instruction = context.system_prompt.strip()
    how = params.get("extract", "whole")
    votes, retries = params.get("votes", 1), params.get("retries", 0)
    limits = {"n": votes, "max_tokens": params.get("max_tokens"), "stop": tuple(params.get("stop", ()))}
    reply = ""
    for attempt in range(retries + 1):
        temperature = params.get("temperature", 1.0) if votes > 1 or attempt else None
        if params.get("form", "chat") == "chat":
            outputs = model.chat(messages(question, instruction, params), temperature=temperature, **limits)
        else:
            outputs = model.complete(prompt(question, instruction, params), temperature=temperature, **limits)
        answers = [a for a in (extract(output.text, how) for output in outputs) if a is not None]
        if answers:
            return Counter(answers).most_common(1)[0][0]
        reply = outputs[0].text.strip()
        if attempt < retries:
            context.note(f"attempt {attempt + 1} of {retries + 1}: no answer in the reply, asking again")
    return reply
