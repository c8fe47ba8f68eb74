"""A way to a broker on which answers get lost, or are others than the broker gave."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from tidegate.embedded.errors import EmbeddedKafkaError

PRODUCE = 0
OFFSET_FETCH = 9
OFFSET_FETCH_BY_GROUP = 8  # the version from which on an answer is a list of groups
NOT_COORDINATOR = 16
_HEAD = struct.Struct(">ihhi")  # length, api key, api version, correlation id
_ANSWER = struct.Struct(">ii")  # length, correlation id


class LossyWay:
    """Stands between clients and a broker, which must advertise `address`.

    Every `lose_every`-th answer to a write, over all connections, is not passed on: the broker has done what was asked, and
    the connection ends before its client hears so. 0 (the default) loses nothing; -1 loses all, and keeps connections open.

    The next `deny_offsets` answers to questions for what a group has committed are those of a broker that has just ceased to be
    the group's coordinator.
    """

    def __init__(self) -> None:
        """Take a port."""
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._target: Callable[[], str] = str
        self._lock = threading.Lock()
        self._writes = 0
        self._sockets: set[socket.socket] = set()
        self.lose_every = 0
        self.lost = 0
        self.deny_offsets = 0

    @property
    def address(self) -> str:
        """Where clients connect."""
        host, port = self._listening.getsockname()
        return f"{host}:{port}"

    def lead_to(self, bootstrap: Callable[[], str]) -> None:
        """Begin to take connections, to the broker whose address this returns; while it has none they end at once."""
        self._target = bootstrap
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._listening.close()
        for end in list(self._sockets):
            self._hang_up(end)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                host, _, port = self._target().rpartition(":")
                broker = socket.create_connection((host, int(port)))
            except (OSError, EmbeddedKafkaError):  # it is away: so are we
                client.close()
                continue
            for end in (client, broker):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.add(end)
            asked: dict[int, tuple[int, int]] = {}
            threading.Thread(target=self._pass_requests, args=(client, broker, asked), daemon=True).start()
            threading.Thread(target=self._pass_answers, args=(client, broker, asked), daemon=True).start()

    def _pass_requests(self, client: socket.socket, broker: socket.socket, asked: dict[int, tuple[int, int]]) -> None:
        with suppress(OSError):
            while True:
                head = _exactly(client, _HEAD.size)
                length, api_key, version, correlation_id = _HEAD.unpack(head)
                if api_key in {PRODUCE, OFFSET_FETCH}:
                    asked[correlation_id] = api_key, version
                broker.sendall(head + _exactly(client, length + 4 - _HEAD.size))
        self._hang_up(client)
        self._hang_up(broker)

    def _pass_answers(self, client: socket.socket, broker: socket.socket, asked: dict[int, tuple[int, int]]) -> None:
        with suppress(OSError):
            while True:
                head = _exactly(broker, _ANSWER.size)
                length, correlation_id = _ANSWER.unpack(head)
                rest = _exactly(broker, length + 4 - _ANSWER.size)
                api_key, version = asked.pop(correlation_id, (-1, 0))
                if api_key == PRODUCE and self._is_to_be_lost():
                    if self.lose_every < 0:
                        continue
                    break
                if api_key == OFFSET_FETCH and self._is_to_be_denied():
                    rest = _denied(rest, version)
                    head = _ANSWER.pack(len(rest) + 4, correlation_id)
                client.sendall(head + rest)
        self._hang_up(client)
        self._hang_up(broker)

    def _is_to_be_lost(self) -> bool:
        with self._lock:
            self._writes += 1
            lose = self.lose_every < 0 or (self.lose_every > 0 and self._writes % self.lose_every == 0)
            self.lost += lose
            return lose

    def _is_to_be_denied(self) -> bool:
        with self._lock:
            deny = self.deny_offsets > 0
            self.deny_offsets -= deny
            return deny

    def _hang_up(self, end: socket.socket) -> None:
        self._sockets.discard(end)
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def _denied(answer: bytes, version: int) -> bytes:
    """Return what a broker answers that is not the coordinator, to the question that this is the coordinator's answer to.

    The format is that of OffsetFetch in Kafka's protocol guide: a tag byte, the throttle time, one group by its name, no topics,
    the error, no tags.
    """
    assert version >= OFFSET_FETCH_BY_GROUP, version
    up_to_name = 1 + 4 + 1  # the count of groups and the name's length are single bytes as long as they are small
    assert answer[up_to_name - 1] == 2, "one group"
    up_to_topics = up_to_name + answer[up_to_name]
    return answer[:up_to_topics] + b"\x01" + struct.pack(">h", NOT_COORDINATOR) + b"\x00\x00"


def _exactly(end: socket.socket, size: int) -> bytes:
    """Read so many bytes. Raises OSError if the connection ends before."""
    parts = bytearray()
    while len(parts) < size:
        part = end.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise ConnectionResetError
        parts += part
    return bytes(parts)
