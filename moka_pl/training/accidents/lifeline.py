"""Connections by which the processes of a run learn that one of them has ended.

A process whose GPU waits for another one's (NCCL) waits for half an hour, in a call that nothing interrupts.
So each process keeps a connection to the first one, which the system closes when the process ends, however
it ends. No clock is involved: a process that is slow, swaps or is stopped is not taken for dead.
"""

import os
import secrets
import selectors
import socket
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

_KEY = "moka_pl/lifeline"  # with the number of a run
#: Of one machine only.
_LOOPBACK = ("127.0.0.1", "localhost")
#: The status of a process that has ended without a word.
LOST = -1
_LONGEST = 256  # bytes of a line
_CONNECTING = 10.0  # seconds

#: Seconds until an idle connection is tried, and between tries; their number. Firewalls forget idle ones.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


class Ended(NamedTuple):
    """A process that has ended before its work was done.

    Attributes:
        rank: Its rank.
        status: What it has ended with, after having told why; ``LOST`` without a word.
    """

    rank: int
    status: int


class Lifeline:
    """This process's end of the connections: the first one's to all others, another one's to the first.

    Args:
        store: The store that has brought the processes together, for this object alone.
        rank: This process's rank.
        host: The first process's machine, as the others know it.
        run: Number of the run, of those that the same processes do one after the other.
    """

    def __init__(self, store: Any, rank: int, host: str, run: int = 1) -> None:
        self._store, self._rank, self._host = store, rank, host
        self._key = f"{_KEY}/{run}"
        self._selector = selectors.DefaultSelector()
        self._others: list[_Other] = []
        self._token = b""
        self._server: socket.socket | None = None
        if rank == 0:
            self._token = secrets.token_hex(16).encode()  # anybody can reach the port
            self._server = _listen(host)
            self._selector.register(self._server, selectors.EVENT_READ)
            store.set(self._key, f"{self._server.getsockname()[1]} {self._token.decode()}")
        mine = weakref.ref(self)

        def let_go() -> None:
            if (parent_s := mine()) is not None:
                parent_s._let_go()

        os.register_at_fork(after_in_child=let_go)

    def connect(self) -> bool:
        """Connects to the first process once it listens; returns whether it has.

        Raises:
            OSError: It cannot be reached.
        """
        if self._rank != 0 and not self._others and self._store.check([self._key]):
            port, token = self._store.get(self._key).decode().split()
            connection = socket.create_connection((self._host, int(port)), _CONNECTING)
            connection.settimeout(None)
            connection.sendall(f"{token} {self._rank}\n".encode())
            self._keep(connection, rank=0)
        return self._rank == 0 or bool(self._others)

    def look(self, seconds: float) -> Ended | None:
        """Returns the first process to end before its work was done, if there is one in these seconds."""
        for key, _ in self._selector.select(seconds):
            if self._server is not None and key.fileobj is self._server:
                with suppress(OSError):
                    self._keep(self._server.accept()[0], rank=None)
            elif ended := self._read(key.data):
                return ended
        return None

    def say(self, ended: Ended) -> None:
        """Tells the others that a process, such as this one, has ended or is about to."""
        for other in list(self._others):
            with suppress(OSError):
                other.connection.sendall(f"{ended.rank} {ended.status}\n".encode())

    def close(self) -> None:
        """Closes all connections."""
        for other in list(self._others):
            self._drop(other)
        if self._server is not None:
            self._server.close()
        self._selector.close()

    def _let_go(self) -> None:
        """Closes what a loader's worker has inherited, which would outlive its parent; the parent's stay."""
        for other in self._others:
            other.connection.close()
        if self._server is not None:
            self._server.close()

    def _keep(self, connection: socket.socket, rank: int | None) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        other = _Other(connection, rank)
        self._others.append(other)
        self._selector.register(connection, selectors.EVENT_READ, other)

    def _drop(self, other: "_Other") -> None:
        self._others.remove(other)
        self._selector.unregister(other.connection)
        other.connection.close()

    def _read(self, other: "_Other") -> Ended | None:
        """Reads what a process says, or that it has gone."""
        some = b""
        with suppress(OSError):  # reset
            some = other.connection.recv(_LONGEST)
        *lines, other.rest = (other.rest + some).split(b"\n")
        for line in lines:
            words = line.split()
            if other.rank is not None:
                self._drop(other)
                return self._passed_on(Ended(int(words[0]), int(words[1])))
            if words[:1] != [self._token]:
                self._drop(other)
                return None
            other.rank = int(words[1])
        if some and len(other.rest) < _LONGEST:
            return None
        self._drop(other)
        return None if other.rank is None else self._passed_on(Ended(other.rank, LOST))

    def _passed_on(self, ended: Ended) -> Ended | None:
        """Returns what is news to all others, too; None of a process that has done its work."""
        if ended.status == 0:
            return None
        self.say(ended)
        return ended


@dataclass(eq=False)
class _Other:
    """A connection.

    Attributes:
        connection: The socket.
        rank: Of the process at its other end; None before it has said so.
        rest: The beginning of a line.
    """

    connection: socket.socket
    rank: int | None
    rest: bytes = b""


def _listen(host: str) -> socket.socket:
    if host in _LOOPBACK:
        return socket.create_server((host, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
