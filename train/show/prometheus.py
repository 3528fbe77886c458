"""log.prometheus=PORT: the numbers of the newest step for a Prometheus server, at http://HOST:PORT/metrics of the machine of rank 0.

Its text format (prometheus.io/docs/instrumenting/exposition_formats) is a line a number, so that no library is needed. Names are those of
train/metrics/names.py with `sluice_` in front. The port is open to whoever reaches the machine, and tells numbers and the run's name.
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
"""Connections that are open at a time, and seconds for which one may say nothing."""
_MEANINGS = {metric.name: metric.meaning for metric in SCALARS}


def require_port(config: Config) -> None:
    """UserError where this machine's port is taken, and rank 0 is to run here."""
    if config.log.prometheus and config.cluster.backend != "ray":
        _server(config.log.prometheus, lambda: b"").server_close()


class PrometheusSink:
    """Serves the scalars of the newest record. UserError where the port is taken. run: the name that every number is labelled with."""

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
    """Every number of a record as a gauge."""
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
    """A thread for each connection, of which the oldest gives way where there are too many: whoever keeps some open keeps no other out."""

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler]):
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        super().__init__(("", port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.append(request)
            late = self._open[:-MOST_CONNECTIONS]
        for each in late:  # its thread reads the end, and closes it
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut is no news."""


def _server(port: int, text: Callable[[], bytes]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = SILENT_SECONDS

        def do_GET(self) -> None:  # as the library names it
            found = self.path.split("?")[0] in ("/", "/metrics")
            body = text() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            """Nobody wants a line for each question."""

    try:
        return _BoundedServer(port, Handler)
    except OSError as error:
        rule = (
            "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be opened: {error.strerror}"
        )
        raise UserError("log.prometheus", port, rule, "choose a free port, or 0 for none") from error
