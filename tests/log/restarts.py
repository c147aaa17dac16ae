"""A server that comes back where its clients look for it."""

from __future__ import annotations

from bascule.runtime.log.server import EmbeddedServer


def restart(server: EmbeddedServer) -> None:
    """Start a server again on the same port, store and passwords, whether or not it was killed."""
    port, passwords = server.port, server.connection.passwords
    server._kill()
    server._launch(port, passwords)
