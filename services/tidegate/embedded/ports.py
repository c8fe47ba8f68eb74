"""Free TCP ports of the loopback interface."""

import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

LOOPBACK = "127.0.0.1"
LOWEST_PORT = 15_000
TRIES = 200

# Ports that the system hands to outgoing connections start here on Linux unless it is configured otherwise.
USUAL_EPHEMERAL_START = 32_768


class NoFreePortError(OSError):
    """No port could be bound in many tries."""


class PortTakenError(OSError):
    """A port that was asked for cannot be listened on; the message says which, why, and what to do."""


def is_free(port: int) -> bool:
    """Say whether a server could listen on this loopback port right now. Blocks not."""
    return not _obstacle(port)


def check_ports(asked: Mapping[str, int], *, wished: Mapping[str, int]) -> None:
    """Raise PortTakenError unless servers could listen on all of these ports right now, one each. 0 is any free one.

    Both are options and their ports. wished: gives way to a free one if it is taken, but not to another option.
    """
    options: dict[int, str] = {}
    for option, port in (*wished.items(), *asked.items()):
        if port and (other := options.setdefault(port, option)) != option:
            raise PortTakenError(
                f"{other} and {option} are both {port}: give one of them another port, or 0 for a free one"
            )
    for option, port in asked.items():
        if port and (obstacle := _obstacle(port)):
            raise PortTakenError(f"{option} {port}: {obstacle} on {LOOPBACK}; choose another port, or 0 for a free one")


def _obstacle(port: int) -> str:
    """Return why no server can listen on a loopback port right now; empty if one can. Blocks not."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do it: connections of a predecessor in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return ""


def choose_port(asked: int | None = None, *, avoid: frozenset[int] = frozenset()) -> int:
    """Return the asked port if it is free, else, and for 0, a random free one. Raises NoFreePortError.

    Nothing keeps the port reserved: the caller must be ready to find it taken when its server binds it.
    """
    if asked and asked not in avoid and is_free(asked):
        return asked
    # Never from the ephemeral range: while a restarted server is away, a client that keeps trying to connect to such
    # a port may be given the very same one as its own source port, connects to itself, and blocks the server's return.
    ceiling = _ephemeral_start()
    for _ in range(TRIES):
        port = LOWEST_PORT + secrets.randbelow(ceiling - LOWEST_PORT)
        if port not in avoid and is_free(port):
            return port
    raise NoFreePortError(f"no free port between {LOWEST_PORT} and {ceiling} on {LOOPBACK} in {TRIES} tries")


def _ephemeral_start() -> int:
    try:
        start = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return USUAL_EPHEMERAL_START
    return start if start > LOWEST_PORT + TRIES else USUAL_EPHEMERAL_START
