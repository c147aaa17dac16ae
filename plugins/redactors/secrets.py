"""The redactor ``secrets``: keys with a known form, values under telling names, and what the environment holds.

It finds what strays into a prompt, a result or a traceback by accident. Whoever wants to smuggle a key past it can:
it does not decode, decrypt or put halves together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import quote

import msgspec

from bascule.plugins.redactors.names import SECRET, secret_name

MIN_VALUE = 8

_ESCAPED = r"(?<=\\[bfnrt])|(?<=\\u[0-9a-fA-F]{4})"
#: Where a key may begin: not inside a word, but behind the escape of another character in JSON text.
_START = rf"(?:(?<![A-Za-z0-9])|{_ESCAPED})"
#: The same for keys of letters, digits, "-" and "_": only where such a run begins, which keeps the scan linear.
_RUN = rf"(?:(?<![A-Za-z0-9_-])|{_ESCAPED})"
_QUOTE = r"\\{0,4}[\"']"
_HEADER = rf"(?:proxy-)?authorization(?:{_QUOTE})?\s{{0,8}}[:=]\s{{0,8}}(?:{_QUOTE})?"
_SCHEME = r"(?:basic|bearer|token|digest|apikey)\s{1,8}"
_BEGIN, _END = (rf"-----{word} [A-Z0-9 ]{{0,40}}PRIVATE KEY(?: BLOCK)?-----" for word in ("BEGIN", "END"))
_VALUE = r"[^\s\"'\\\[]"

#: Rules in order; what group 1 matches is kept in front of the mark. Repetitions that can fail are bounded.
RULES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in (
        ("private-key", rf"{_BEGIN}.*?(?:{_END}|\Z)"),
        ("anthropic-key", r"sk-ant-[A-Za-z0-9_-]{8,}"),
        ("openai-key", rf"{_START}sk-(?:proj|svcacct|admin|None|or-v1)-[A-Za-z0-9_-]{{16,}}"),
        ("openai-key", rf"{_START}sk-(?=[A-Za-z]{{0,64}}[0-9])[A-Za-z0-9]{{20,}}"),
        ("github-token", r"(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})"),
        ("gitlab-token", r"glpat-[A-Za-z0-9_-]{16,}"),
        ("slack-token", r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("aws-key", rf"{_START}(?:AKIA|ASIA)[A-Z0-9]{{16}}(?![A-Z0-9])"),
        ("google-key", rf"{_START}AIza[A-Za-z0-9_-]{{30,}}"),
        ("huggingface-token", rf"{_START}hf_[A-Za-z0-9]{{30,}}"),
        ("npm-token", rf"{_START}npm_[A-Za-z0-9]{{30,}}"),
        ("pypi-token", rf"{_START}pypi-[A-Za-z0-9_-]{{40,}}"),
        ("jwt", rf"{_RUN}eyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{8,}}(?:\.[A-Za-z0-9_-]+){{1,3}}"),
        ("authorization", rf"((?i:{_HEADER}{_SCHEME})){_VALUE}{{6,}}"),
        # Without a scheme it has a digit: "Authorization: required" is prose.
        ("authorization", rf"((?i:{_HEADER}))(?={_VALUE}{{0,64}}[0-9]){_VALUE}{{12,}}"),
        ("bearer", r"(\b(?i:bearer)\s{1,8})(?=[A-Za-z._~+/=-]{0,64}[0-9]|[A-Za-z._~+/=-]{20})[A-Za-z0-9._~+/=-]{8,}"),
        ("url-password", r"(://[^\s/@:\"'<>\\]{0,256}:)[^\s/@\"'<>\\]{1,256}(?=@)"),
        ("named-value", rf"([?&](?i:{SECRET})=)[^\s&\"'<>\\\[]{{6,}}"),
        ("named-value", rf"({_START}(?i:{SECRET})(?:{_QUOTE})?\s{{0,4}}[:=]\s{{0,4}}{_QUOTE}){_VALUE}{{6,}}"),
    )
)
MARK = re.compile(r"\[redacted:[a-z-]+\]")

#: Of each rule, and of each secret name in lower case, something that cannot be missing from a value's JSON.
_NEEDLES = (
    *(b"-----BEGIN ", b"sk-", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_", b"glpat-", b"xox"),
    *(b"AKIA", b"ASIA", b"AIza", b"hf_", b"npm_", b"pypi-", b"eyJ"),
)
_WORDS = (b"authorization", b"bearer", b"passw", b"passphrase", b"pwd", b"secret", b"credential", b"key")
#: Not the names of our own that count or hold pieces of text.
_TOKEN = re.compile(rb"token(?!_ids|s\")")


class Secrets:
    """See the module.

    Args:
        environ: its values of at least 8 characters under names that look secret are redacted wherever they occur;
            the process's own environment by default.
    """

    name = "secrets"
    version = "1"

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        values = secret_values(os.environ if environ is None else environ)
        forms = {form for value in values for form in (value, _json(value), quote(value, safe=""))}
        longest_first = sorted(forms, key=lambda form: (-len(form), form))
        self._literals = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._needles = (*_NEEDLES, *(_json(form).encode() for form in longest_first))

    def suspects(self, payload: bytes) -> bool:
        """Whether a rule could apply to any text of ``payload``: a quick look that may be wrong only by saying yes."""
        if any(needle in payload for needle in self._needles) or (b"://" in payload and b"@" in payload):
            return True
        lower = payload.lower()
        return any(word in lower for word in _WORDS) or _TOKEN.search(lower) is not None

    def redact(self, text: str, key: str | None) -> str:
        """``text`` without its secrets; all of it is one under a name such as ``api_key``."""
        if key is not None and text and not MARK.fullmatch(text) and secret_name(key):
            return "[redacted:named-value]"
        if self._literals is not None:
            text = self._literals.sub("[redacted:environment]", text)
        for rule, pattern in RULES:
            text = pattern.sub(rf"\1[redacted:{rule}]" if pattern.groups else f"[redacted:{rule}]", text)
        return text


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values of at least 8 characters under names that look secret."""
    return tuple(
        value
        for name, value in environ.items()
        if name not in ("PWD", "OLDPWD") and len(value) >= MIN_VALUE and (secret_name(name) or name.endswith("_KEY"))
    )


def _json(text: str) -> str:
    """``text`` as it stands between the quotes of JSON."""
    return msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode()[1:-1]
