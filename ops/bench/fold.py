"""``python -m ops.bench.fold EVENTS``: fold a synthetic run in a process of its own, and print what that took."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from bascule.runtime.log.chain import Chain
from bascule.runtime.state import RunState
from bascule.schemas.codec import decode
from ops.bench.synthetic import new_events

RUN = "bench"


def peak_bytes() -> int:
    """The most memory that this process has held. (``ru_maxrss`` would count its parent's from before the exec.)"""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    before, start = peak_bytes(), time.perf_counter()
    chain, state = Chain(), RunState(run=RUN)
    for seq, new in enumerate(new_events(RUN, int(sys.argv[1])), 1):
        event = decode(seq, new.subject, new.payload)
        chain.add(event)
        state.apply(event)
    peak, seconds = peak_bytes(), time.perf_counter() - start
    print(json.dumps({"before": before, "peak": peak, "state": len(state.digest()), "seconds": seconds}))


if __name__ == "__main__":
    main()
