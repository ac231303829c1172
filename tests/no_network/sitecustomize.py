"""Refuse every connection but loopback. A folder on PYTHONPATH with this file guards a process and all its children."""

import ipaddress
import socket


class NetworkBlocked(ConnectionError):
    "A test tried to leave the machine."


def allowed(address: object) -> bool:
    "Whether an address stays on this machine: a Unix socket, or a loopback host."
    if not isinstance(address, tuple):
        return True
    host = str(address[0]).split("%")[0]
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guarded(original):
    "Wrap a method of socket.socket that takes an address last."

    def call(self, *args):
        if args and not allowed(args[-1]):
            raise NetworkBlocked(f"network is blocked in tests: {args[-1]}")
        return original(self, *args)

    return call


def guarded_lookup(original):
    "Wrap socket.getaddrinfo: a name that is not this machine's is not looked up."

    def lookup(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name and name != socket.gethostname() and not allowed((name,)):
            raise NetworkBlocked(f"network is blocked in tests: {name}")
        return original(host, *args, **kwargs)

    return lookup


def block() -> dict:
    "Patch the socket module; give back what `unblock` needs."
    old = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    for name, method in old.items():
        setattr(socket.socket, name, guarded(method))
    old["getaddrinfo"] = socket.getaddrinfo
    socket.getaddrinfo = guarded_lookup(old["getaddrinfo"])
    return old


def unblock(old: dict) -> None:
    "Undo `block`."
    for name, method in old.items():
        setattr(socket if name == "getaddrinfo" else socket.socket, name, method)


if __name__ == "sitecustomize":
    block()
