"""log.prometheus=PORT: serves the newest step's numbers to a Prometheus server, at http://HOST:PORT/metrics on rank 0's
machine.

Its text format (prometheus.io/docs/instrumenting/exposition_formats) has one line per number, so no library is needed.
Metric names are those of train/metrics/names.py with the prefix `sluice_`. The port is open to anyone who can reach the
machine, and shows numbers and the run's name.
"""

import errno
import math
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from train.metrics.names import SCALARS, Record

MOST_CONNECTIONS, SILENT_SECONDS = 16, 10.0
"""Maximum number of open connections, and seconds after which a silent connection is closed."""
_MEANINGS = {metric.name: metric.meaning for metric in SCALARS}


def require_port(config: Config) -> None:
    """Raise UserError if the port is taken on this machine and rank 0 will run here."""
    if config.log.prometheus and config.cluster.backend != "ray":
        _server(config.log.prometheus, lambda: b"").server_close()


class PrometheusSink:
    """Serves the scalars of the newest record. Raises UserError if the port is taken. run: the label of every
    number."""

    def __init__(self, port: int, run: str):
        self._run, self._text = run, b""
        self._http = _server(port, lambda: self._text)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def write(self, record: Record) -> None:
        self._text = prometheus_text(record, self._run)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def prometheus_text(record: Record, run: str) -> bytes:
    """Every number of a record as a Prometheus gauge."""
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        known = "sluice_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        shown = "NaN" if math.isnan(value) else ("-Inf" if value < 0 else "+Inf") if math.isinf(value) else repr(value)
        if meaning := _MEANINGS.get(name):
            lines.append(f"# HELP {known} {meaning}")
        lines += [f"# TYPE {known} gauge", f'{known}{{run="{label}"}} {shown}']
    return "".join(f"{line}\n" for line in lines).encode()


class _BoundedServer(ThreadingHTTPServer):
    """An HTTP server with a thread per connection. Too many connections close the oldest, so a client that keeps
    connections open cannot block others."""

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler]):
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        super().__init__(("", port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.append(request)
            late = self._open[:-MOST_CONNECTIONS]
        for each in late:  # its thread reads the end of the stream and closes the socket
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing: a cut connection is normal."""


def _server(port: int, text: Callable[[], bytes]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = SILENT_SECONDS

        def do_GET(self) -> None:  # name required by the library
            found = self.path.split("?")[0] in ("/", "/metrics")
            body = text() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            """Prints nothing: one log line per request would be too many."""

    try:
        return _BoundedServer(port, Handler)
    except OSError as error:
        rule = (
            "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be opened: {error.strerror}"
        )
        raise UserError("log.prometheus", port, rule, "choose a free port, or 0 for none") from error
