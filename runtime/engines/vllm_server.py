"""A vLLM server as a child process: found, started on a free port, and gone with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from bascule.plugins.extras import install_command
from bascule.runtime.engines import keeper
from bascule.schemas.errors import ConfigError

ENVIRONMENT_ENV: Final = "BASCULE_VLLM"
KEY_ENV: Final = "VLLM_API_KEY"
_LAST_BYTES = 16_384
_LAST_LINES = 12
_CLOSE_SECONDS = 30.0
_SETTLE_SECONDS = 5.0


def find_python(environment: str = "") -> str:
    """The interpreter that has vLLM: of the environment named here or in ``BASCULE_VLLM``, this one, or a checkout's.

    Args:
        environment: folder of a virtual environment.

    Raises:
        ConfigError: there is none.
    """
    named = environment or os.environ.get(ENVIRONMENT_ENV, "")
    if not named and find_spec("vllm") is not None:
        return sys.executable
    own = Path(__file__).resolve().parents[2] / ".venv-vllm"  # where `make vllm-env` puts it
    python = (Path(named).expanduser() if named else own) / "bin" / "python"
    if not os.access(python, os.X_OK):
        what = f"There is no Python environment in {named}." if named else "vLLM was not found."
        raise ConfigError(
            what,
            next_step=f"Install it with `make vllm-env` for a CPU, or on a GPU host with {install_command('vllm')}; "
            f"or set {ENVIRONMENT_ENV} to the environment that has it, or name a running server in engine.params.url.",
        )
    return str(python)


class ServerProcess:
    """A server that this process started.

    Attributes:
        url: where it will listen.
        key: what it asks of its callers.
        log: the file that holds what it prints.
    """

    def __init__(self, process: asyncio.subprocess.Process, url: str, key: str, log: Path) -> None:
        self._process = process
        self.url = url
        self.key = key
        self.log = log

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def last_lines(self) -> str:
        """The end of what it printed."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LAST_BYTES))
            text = file.read().decode("utf-8", "replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-_LAST_LINES:])

    async def settle(self) -> None:
        """Wait for its end if it is ending: the last of its connections break before."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._process.wait()), _SETTLE_SECONDS)

    async def close(self) -> None:
        """End it, and all processes that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _CLOSE_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def start_server(
    python: str, model: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> ServerProcess:
    """Start vLLM's OpenAI server on this machine; it answers once it has loaded its model.

    Args:
        python: the interpreter that has vLLM.
        arguments: after the model's name, those of the port and the address excepted.
        environment: added to this process's.
        log: is written anew.
    """
    key, port = secrets.token_urlsafe(24), _free_port()
    argv = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *arguments,
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            keeper.__file__,
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment, KEY_ENV: key},
        )
    return ServerProcess(process, f"http://127.0.0.1:{port}", key, log)


def _free_port() -> int:
    """A port of the system's choice. Another process may take it first; then the server says so and ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
