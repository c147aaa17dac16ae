"""An engine and a trainer start in two threads of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tiny_model import make_tiny_model

SCRIPT = """
import sys, threading
from pathlib import Path
from bascule.trainers.base_model import load_model, load_tokenizer
folder, errors = Path(sys.argv[1]), []
def load(f):
    try:
        f(folder)
        from bascule.trainers.lora import attach_lora
        from bascule.trainers.params import TrainParams
        if f is load_model: attach_lora(f(folder), TrainParams(lora_r=4), 0)
    except BaseException as e:
        errors.append(repr(e))
threads = [threading.Thread(target=load, args=(f,)) for f in (load_model, load_tokenizer, load_model, load_tokenizer)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not errors, errors
"""


def test_models_load_from_several_threads_at_once_in_a_fresh_process(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "tiny")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
