"""Small messages between two processes: JSON, one a line, over a socket that is never waited for."""

import json
import socket
from typing import Any

Message = dict[str, Any]
LONGEST = 1 << 20  # bytes that may come at once


class Wire:
    """One end of a connection. A lost one takes messages and gives none."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.is_lost = False
        self._in, self._out = b"", b""

    def send(self, message: Message) -> None:
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the other end has room for."""
        try:
            while self._out and not self.is_lost:
                self._out = self._out[self.socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self.is_lost = True

    def receive(self) -> list[Message]:
        """What has come."""
        try:
            while not self.is_lost and (data := self.socket.recv(1 << 16)):
                self._in += data
                self.is_lost = len(self._in) > LONGEST
            self.is_lost = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_lost = True
        *lines, self._in = self._in.split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):  # who is there speaks another language
            self.is_lost = True
            return []

    def close(self) -> None:
        self.socket.close()
