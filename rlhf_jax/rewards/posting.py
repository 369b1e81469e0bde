"""One request over HTTP whose answer is whole by a moment, however slowly the other end sends it.

This file imports neither JAX nor NumPy: it is loaded by the process that rewards run in, too.
"""

import http.client
import io
import json
import socket
import time
import urllib.error
import urllib.request
from typing import Any


class _Held(io.RawIOBase):
    """A socket's bytes, until a moment of the monotonic clock."""

    def __init__(self, source: io.RawIOBase, connection: socket.socket, until: float) -> None:
        self._source, self._connection, self._until = source, connection, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer, headers included, for which there is as long altogether as its socket would wait for each byte."""

    def __init__(
        self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None
    ) -> None:
        super().__init__(sock, debuglevel, method, url)
        seconds = sock.gettimeout()
        assert seconds is not None
        self.fp = io.BufferedReader(_Held(self.fp.detach(), sock, time.monotonic() + seconds))


class _Http(http.client.HTTPConnection):
    response_class = _Response


class _Https(http.client.HTTPSConnection):
    response_class = _Response


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, req)


def post(address: str, body: Any, key: str, seconds: float) -> tuple[int | None, str, float]:
    """Status (None where there was no whole answer in `seconds`), what was said, and the seconds to wait that it asks
    for. `body` is sent as JSON, `key` as a bearer's token; none is sent where it is empty.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_HttpHandler, _HttpsHandler)
    try:
        try:
            response = opener.open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            response = error  # an answer too
        with response:
            asks_for = response.headers.get("Retry-After", "")
            wait = float(asks_for) if asks_for.isdigit() else 0.0
            return response.status, response.read().decode(errors="replace"), wait
    except urllib.error.URLError as error:
        return None, str(error.reason), 0.0
    except (OSError, http.client.HTTPException) as error:  # it hung up, or came too late with the rest
        return None, str(error) or type(error).__name__, 0.0
