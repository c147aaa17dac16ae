"""Run by the Python that has vLLM: holds vLLM in this process against the kit, and prints what each check found.

``python -m tests.engines.vllm_within FOLDER CONTEXT``; the folder holds the adapters, each in a folder of its name.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from bascule.plugins.kit_engine import Conditions, check_engine
from bascule.runtime.engines import vllm
from bascule.trainers.base_model import DEFAULT_MODEL, resolve_model
from tests.engines.served import oracle_of


async def main(folder: Path, context: int) -> None:
    adapters = {found.name: found for found in sorted(folder.iterdir())}
    engine = vllm.make(
        DEFAULT_MODEL,
        {
            "mode": "inside",
            "dtype": "float32",
            "eager": True,
            "max_model_len": context,
            "max_lora_rank": 8,
        },
    )
    await engine.start()
    oracle = oracle_of(resolve_model(), adapters)
    given = Conditions(oracle=oracle, tolerance=1e-3, adapters=adapters, context=context, max_tokens=4)
    found = {c.name: [c.outcome, c.found] async for c in check_engine(engine, given)}
    await engine.close()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
