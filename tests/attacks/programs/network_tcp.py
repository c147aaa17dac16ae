"""Sends over TCP, IPv4 and IPv6, to this machine and out of it."""

import socket


def sent(family, address, text):
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(address)
        connection.sendall(text.encode())
    return "connected"


def attempts(given):
    yield "IPv4", lambda: sent(socket.AF_INET, ("127.0.0.1", given["tcp"]), given["say"])
    yield "by create_connection", lambda: socket.create_connection(("127.0.0.1", given["tcp"]), 10).close() or "done"
    if given["confined"]:
        yield "IPv6", lambda: sent(socket.AF_INET6, ("::1", given["tcp"]), given["say"])
        yield "out of here", lambda: sent(socket.AF_INET, ("192.0.2.1", 443), given["say"])
