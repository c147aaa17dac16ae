"""Sends over UDP and by raw sockets."""

import socket


def sent(kind, port, text):
    with socket.socket(socket.AF_INET, kind) as out:
        return f"{out.sendto(text.encode(), ('127.0.0.1', port))} bytes"


def attempts(given):
    yield "datagram", lambda: sent(socket.SOCK_DGRAM, given["udp"], given["say"])
    if given["confined"]:
        yield "raw", lambda: sent(socket.SOCK_RAW, given["udp"], given["say"])
        yield "packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close() or "open"
        yield "netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close() or "open"
