"""One check, in a process of its own: what is asked comes as JSON on standard input, a line for each finding goes out.

Whatever a plugin, a task or a package prints goes to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module

import msgspec

from bascule.plugins.redactors.secrets import Secrets
from bascule.runtime.doctor.finding import Asked, Finding, failed
from bascule.runtime.doctor.report import CHECKS, Line
from bascule.runtime.redaction import Redaction
from bascule.schemas.errors import BasculeError


def main(name: str) -> None:
    """Run the check ``name``."""
    out = os.dup(1)
    os.dup2(2, 1)
    redaction = Redaction([Secrets()])

    def say(line: Line) -> None:
        os.write(out, msgspec.json.encode(redaction.value(line)) + b"\n")

    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    if name == "configure":
        from bascule.runtime.doctor.configured import made_config

        try:
            say(Line(config=made_config(asked)))
        except BasculeError as e:
            say(Line(finding=failed("configuration", e)))
    else:
        module, function = CHECKS[name].function.split(":")
        check: Callable[[Asked], Iterator[Finding]] = getattr(import_module(module), function)
        for finding in check(asked):
            say(Line(finding=finding))
    say(Line(done=True))
    # What a check left behind, a call that hangs for instance, is not waited for.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
