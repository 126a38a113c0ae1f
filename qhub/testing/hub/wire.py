"""Speaks HTTP/1.1 over loopback: finds a request's endpoint, sends its answer, carries out ordered faults."""

from __future__ import annotations

import logging
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from qhub.testing.hub.replies import FileSlice, HubError, Reply
from qhub.testing.hub.requests import ConnectionCutError, Request, RequestBody
from qhub.testing.hub.state import HubState, Served

__all__ = ["Listener", "Route"]

Route = tuple[str, str, Callable[..., Reply]]

_log = logging.getLogger(__name__)
_PIECE = 1 << 16


class Listener(ThreadingHTTPServer):
    """Serves routes on a free port of 127.0.0.1 in a background thread.

    ``storage=False`` makes it the Hub itself, which reads tokens. ``storage=True`` makes it the storage:
    as on the real Hub another origin, which never gets a token and trusts signed addresses.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, state: HubState, routes: Iterable[Route], *, storage: bool) -> None:
        self.state = state
        self.storage = storage
        self._routes = [(method, re.compile(pattern), endpoint) for method, pattern, endpoint in routes]
        self._open: set[socket.socket] = set()
        self._reset: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, name="qhub-hub-server", daemon=True
        )

    @property
    def url(self) -> str:
        """Return the origin to reach it at."""
        # The client takes a storage under the Hub's host name for the Hub itself, 1.33 on any port: it sends
        # its token there, and expects a file's metadata there.
        return f"http://{'localhost' if self.storage else '127.0.0.1'}:{self.server_port}"

    def server_bind(self) -> None:
        """Bind without looking up the host's name, which can take seconds where there is no name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and end the connections that clients keep open."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in list(self._open):
            self.cut(connection)

    def cut(self, connection: socket.socket, *, reset: bool = False) -> None:
        """End a connection, by an orderly close or by a TCP reset when it is closed."""
        if reset:
            # A linger time of zero turns the close into a reset; shutdown_request must not say goodbye first.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._reset.add(connection)
            return
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            _log.debug("the client had ended the connection already")

    def find(self, method: str, path: str) -> tuple[Callable[..., Reply], dict[str, str | None]]:
        """Find the endpoint for an encoded path and its decoded arguments. Raises HubError 404 or 405."""
        known = False
        for allowed, pattern, endpoint in self._routes:
            if match := pattern.fullmatch(path):
                known = True
                if allowed == method:
                    # Decoded only now: a branch name and a folder may hold an encoded slash.
                    return endpoint, {k: v and unquote(v) for k, v in match.groupdict().items()}
        if known:
            raise HubError(405, f"{method} is not served at {path}")
        raise HubError(404, f"Nothing is at {path}")

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember a connection while it is open."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, at once if it is to be reset."""
        self._open.discard(request)
        if request in self._reset:
            self._reset.discard(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep an error for the test to see; a client that went away is none."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            self.state.errors.append(error)


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version = "qhub-testing-hub"
    # Headers and body leave in two writes, which Nagle's algorithm would set 40 ms apart.
    disable_nagle_algorithm = True
    timeout = 60
    server: Listener

    def do_GET(self) -> None:
        """Serve a request of any method."""
        self._user: str | None = None
        self._body: RequestBody | None = None
        limit = self.server.state.limits.request
        try:
            reply = self._answer()
            self._record(reply)
            # A connection closed on an unread body is reset, and the client may lose the answer with it.
            if self._body is None or not self._body.drain(limit):
                self.close_connection = True
            self._send(reply)
        except ConnectionCutError:
            self._record(Reply(status=0))
            self._cut()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Log through ``logging`` instead of to stderr."""
        _log.debug(format, *args)

    def _answer(self) -> Reply:
        state = self.server.state
        target = urlsplit(self.path)
        path = unquote(target.path)
        # HEAD is GET whose body is not sent.
        method = "GET" if self.command == "HEAD" else self.command
        try:
            self._body = body = RequestBody(self.rfile, self.headers)
            if (status := state.faults.take_status(self.command, path)) is not None:
                raise HubError(status, "A test ordered this answer")
            if self.server.storage and method == "PUT":
                body.cut_after = state.faults.take_upload_cut(body.length)
            authorization = self.headers.get("Authorization")
            if not self.server.storage:
                self._user = state.user_of(authorization)
            elif authorization is not None:
                raise HubError(400, "Only one auth mechanism allowed: a token must not leave the Hub")
            endpoint, arguments = self.server.find(method, target.path)
            request = Request(state, method, path, target.query, self.headers, body, self._user)
            return endpoint(request, **arguments)
        except HubError as error:
            return error.reply()
        except ConnectionCutError:
            raise
        except Exception as error:
            # Whatever an endpoint did not expect is an error of this server: the client learns it as a 500,
            # the test when the server stops.
            _log.exception("%s %s failed", self.command, path)
            state.errors.append(error)
            return HubError(500, f"The test server failed: {error!r}").reply()

    def _record(self, reply: Reply) -> None:
        path = unquote(urlsplit(self.path).path)
        file = reply.body.name if isinstance(reply.body, FileSlice) else None
        served = Served(self.command, path, reply.status, self._user, file, self.headers.get("Range"))
        self.server.state.served.append(served)

    def _send(self, reply: Reply) -> None:
        body = reply.body
        length = body.length if isinstance(body, FileSlice) else len(body)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, FileSlice):
            self._send_file(body)
        else:
            self.wfile.write(body)

    def _send_file(self, part: FileSlice) -> None:
        fault = self.server.state.faults.take_download(part.name, part.start, part.length)
        end = part.start + (part.length if fault.cut_after is None else fault.cut_after)
        with part.path.open("rb") as file:
            file.seek(part.start)
            while (start := file.tell()) < end:
                piece = bytearray(file.read(min(_PIECE, end - start)))
                for offset in fault.corrupt:
                    if start <= offset < start + len(piece):
                        piece[offset - start] ^= 0xFF
                self.wfile.write(piece)
        if fault.cut_after is not None:
            self._cut(reset=fault.reset)

    def _cut(self, *, reset: bool = False) -> None:
        self.close_connection = True
        self.server.cut(self.connection, reset=reset)
