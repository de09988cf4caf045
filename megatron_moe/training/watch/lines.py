"""Small messages, one JSON object a line, over a socket that never makes the watcher wait for long."""

import json
import socket
from typing import Any

Message = dict[str, Any]
LONGEST = 1 << 20  # bytes of a line
SEND_S = 1.0


class Lines:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(SEND_S)
        self._rest = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message) -> bool:
        """False when the other end is gone, or takes nothing."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """What has come, when something has; None when the other end is gone or sends what is no message."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LONGEST:
            return None
        try:
            found = [json.loads(line) for line in whole]
        except ValueError:
            return None
        return found if all(isinstance(message, dict) for message in found) else None

    def close(self) -> None:
        self.socket.close()
