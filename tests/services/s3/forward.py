"""A TCP port at another address that forwards to a server on 127.0.0.1, for hosts that cannot reach that one."""

from __future__ import annotations

import socket
import threading


class Forward:
    """Forwards every connection to ``host``:``port`` to 127.0.0.1:``port``."""

    def __init__(self, host: str, port: int) -> None:
        self._port = port
        self._server = socket.create_server((host, port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no new connections."""
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()
