"""Names and addresses of this machine: which reach it, which are its own."""

import ipaddress
import socket


def bare(host: str) -> str:
    """A Host header without its port: any may be, as tunnels have others."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_address(host: str) -> bool:
    """Whether it is one, of four numbers or of version 6: no name that could resolve to us."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_everywhere(host: str) -> bool:
    return is_address(host) and ipaddress.ip_address(host).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether it is this machine alone that can reach it."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def named(host: str) -> frozenset[str]:
    """What may be called so in a Host header where that is listened on."""
    here = {"localhost", "127.0.0.1", "::1"}
    if is_everywhere(host):
        return frozenset(here | {socket.gethostname().lower(), socket.getfqdn().lower()})
    return frozenset({host.lower()} | (here if is_loopback(host) else set()))
