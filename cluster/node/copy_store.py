"""Copies of a run's state in the memory of its nodes: the files of a node, and the server for ranks of other nodes.

Every few steps (checkpoint.every_memory), each rank writes its part of the state to its own node's folder and to the
next node's folder. A node holds

    /dev/shm/sluice-UID-RUN-ID-NODE/           RUN: digest of the run folder's path; ID: random digits stored in the run
                                               folder
        .lock                                  locked by the agent as long as the agent lives
        attempt_00002.step_00000030.world_16/  one set: the state after step 30, written by the 16 ranks of attempt 2
            rank_00003.safetensors             part of rank 3, as in a checkpoint on disk
            rank_00003.json                    index of this part, written last: once it exists, the part is complete

A set counts as a checkpoint when the answering nodes together hold the parts of all ranks. At most two sets exist: a
complete set, and a set that is being written. Every rank removes all other sets before it writes.

The agent serves the folder: PUT stores a file, GET reads a part of a file. Both need the run's token. A PUT of an
earlier attempt is refused, because ranks on a disconnected node may live for a while. A later launch of the run
finds the files and can resume from them. This file uses neither Ray nor torch.
"""

import contextlib
import fcntl
import hmac
import http.client
import os
import re
import shutil
import socket
import socketserver
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import IO, Any

from cluster.run_files import RANK_FILE
from conf.disk import cure_of_writing

PIECE_BYTES = 1 << 20
"""Maximum bytes that a single read or write transfers."""
CONNECTIONS = 256
"""Maximum connections at once, each in a thread. Further connections wait."""
ADMISSION = 10.0
"""Seconds in which a new connection must send the token."""
STALE = 24 * 3600.0
"""Minimum age in seconds at which another run's unlocked folder is removed."""
_SET = re.compile(r"attempt_(\d{5,18})\.step_(\d{8,18})\.world_(\d{1,18})")
_PATH = re.compile(rf"/({_SET.pattern})/({RANK_FILE.pattern})")


@dataclass(frozen=True, order=True)
class SetId:
    """Name of one set of copies: the state after one step. Sets are ordered by age."""

    attempt: int
    step: int
    world: int

    @property
    def name(self) -> str:
        return f"attempt_{self.attempt:05d}.step_{self.step:08d}.world_{self.world}"

    @staticmethod
    def parse(name: str) -> "SetId | None":
        match = _SET.fullmatch(name)
        return SetId(*map(int, match.groups())) if match else None


def held(folder: Path) -> dict[str, list[int]]:
    """Return, for each set of copies, the ranks whose part of the state is complete."""
    found: dict[str, list[int]] = {}
    for inner in folder.glob("attempt_*"):
        with contextlib.suppress(FileNotFoundError):  # a rank is removing this set
            parts = [match for name in os.listdir(inner) if (match := RANK_FILE.fullmatch(name))]
            ranks = [int(match[1]) for match in parts if match[2] == "json"]
            if ranks:
                found[inner.name] = sorted(ranks)
    return found


def prune(folder: Path, keep: Collection[str], attempt: int) -> None:
    """Remove the sets of copies of this attempt and of earlier attempts, except the sets `keep`."""
    for inner in folder.glob("attempt_*"):
        found = SetId.parse(inner.name)
        if found is not None and found.attempt <= attempt and inner.name not in keep:
            shutil.rmtree(inner, ignore_errors=True)  # another rank of this node may also be removing it


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in the folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a rank is removing this file
            total += path.stat().st_size
    return total


@dataclass(frozen=True)
class OpenedCopy:
    """Result of the request to store copies on a node."""

    port: int = 0
    """Port at which the agent serves the copies, or 0."""
    problem: str = ""
    """Why the agent does not serve the copies, and the fix; or empty."""
    passes: bool = False
    """Whether the problem is temporary: another agent has locked the folder."""
    absent: bool = False
    """Whether the folder does not exist."""


def why_not_opened(folder: Path, error: OSError) -> OpenedCopy:
    """Convert an error of `Store` to an OpenedCopy, which explains the problem."""
    if isinstance(error, BlockingIOError):
        return OpenedCopy(
            problem=f"another agent of this run holds {folder}; the driver repeats the request until that agent has ended",
            passes=True,
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        cure = "create it on every node, or set checkpoint.memory_folder to an existing folder of every node"
        return OpenedCopy(problem=f"the folder {folder.parent} does not exist; {cure}", absent=True)
    cure = cure_of_writing(error)
    return OpenedCopy(
        problem=f"{folder} cannot be used: {error}; {cure}, or set checkpoint.memory_folder to another folder"
    )


class Store:
    """The copies of one node, in a locked folder, served on `address`. attempt: function that returns the newest
    attempt.
    """

    def __init__(self, folder: Path, token: str, address: str, attempt: Callable[[], int]):
        """Lock the folder and start the server. Raises OSError if the folder cannot be created, belongs to another
        user, or is locked.
        """
        self.folder, self.token, self.attempt = folder, token, attempt
        _own(folder)
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        _take_lock(self._lock, folder)
        self._server = _Server((address, 0), _Handler)
        self._server.store = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def close(self, remove: bool) -> None:
        """Stop serving. remove: whether to remove the copies too."""
        self._server.shutdown()
        self._server.server_close()
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)  # a rank that is being killed may still write a file
        os.close(self._lock)


def _own(folder: Path) -> None:
    """Create the folder, or check that this user owns it. Links are not followed."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(
            f"{folder} is a {'link' if stat.S_ISLNK(found.st_mode) else 'file'} that Sluice did not create, and not a folder"
        )
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to user {found.st_uid}")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)


def _take_lock(handle: int, folder: Path, patience: float = 5.0) -> None:
    """Lock the folder. Wait up to `patience` seconds for an earlier agent that is being killed."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise
            time.sleep(0.05)


def folder_name(run: str, id: str, node: str) -> str:
    """Return the name of a run's folder on a node. id: random id of the run."""
    return f"sluice-{os.geteuid()}-{run}-{id}-{re.sub(r'[^A-Za-z0-9.]', '_', node)}"


def sweep(mine: Path) -> None:
    """Remove unlocked old folders next to `mine`: folders of this run and node with another id, and this user's other
    folders older than STALE.
    """
    kind, user, run, id, node = mine.name.split("-")
    for folder in mine.parent.glob(f"{kind}-{user}-*-*-*"):
        if folder == mine:
            continue
        with contextlib.suppress(
            OSError
        ):  # an agent holds it, another agent removes it, or it is a link or another user's folder
            lock = _open_lock(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                parts = folder.name.split("-")
                outlived = parts[2] == run and parts[4] == node and parts[3] != id
                if outlived or time.time() - folder.stat().st_mtime > STALE:
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def _open_lock(folder: Path) -> int:
    """Open the lock file of this user's folder. Raises OSError."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} was not created by Sluice")
    return os.open(folder / ".lock", os.O_RDWR | os.O_NOFOLLOW)


class _Server(socketserver.ThreadingTCPServer):
    """Serves a limited number of connections, and soon closes connections without the token.

    http.server's class is not used, because it asks the name service for this host's name.
    """

    daemon_threads = True
    request_queue_size = 1024  # all ranks of a resuming run read at once
    store: Store

    def __init__(self, *arguments: Any):
        self._slots = threading.Semaphore(CONNECTIONS)
        self._unadmitted: dict[socket.socket, float] = {}
        """Deadlines of the connections that have not sent the token."""
        self._closing = False
        super().__init__(*arguments)

    def admit(self, connection: socket.socket) -> None:
        """Record that a connection has sent the token, or has ended."""
        self._unadmitted.pop(connection, None)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        assert isinstance(request, socket.socket), "a server of TCP"
        while not self._slots.acquire(timeout=0.1):
            self.service_actions()
            if self._closing:
                super().shutdown_request(request)
                return
        self._unadmitted[request] = time.monotonic() + ADMISSION
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Close connections that have not sent the token in time. The server calls this method often."""
        for connection, deadline in list(self._unadmitted.items()):
            if time.monotonic() > deadline:
                self.admit(connection)
                with contextlib.suppress(OSError):  # the connection has ended
                    connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        assert isinstance(request, socket.socket), "a server of TCP"
        self.admit(request)
        super().shutdown_request(request)
        self._slots.release()

    def shutdown(self) -> None:
        self._closing = True
        super().shutdown()

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        # An OSError means that the other end has disconnected. The other end reports the problem itself.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Handles PUT and GET of /SET/FILE. A PUT removes the other sets of copies of this attempt and of earlier attempts,
    except the set that the header X-Keep names.
    """

    protocol_version = "HTTP/1.1"
    server: _Server  # pyrefly: ignore[bad-override-mutable-attribute]  socketserver gives a handler the server that made it
    timeout = 60

    def do_PUT(self) -> None:
        match = self._admit()
        if match is None:
            return
        given = self.headers.get("Content-Length")
        if given is None or not re.fullmatch(r"\d{1,18}", given):
            self._refuse(411 if given is None else 400, "Content-Length must say how many bytes come")
            return
        store, length, attempt = self.server.store, int(given), int(match[2])
        if attempt < store.attempt():
            self._refuse(409, f"attempt {attempt} is over, this node is in attempt {store.attempt()}")
            return
        prune(store.folder, {match[1], self.headers.get("X-Keep", "")}, attempt)
        target = store.folder / match[1] / match[5]
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            with open(temporary, "wb", buffering=0) as file:
                if not self._receive(file.fileno(), length):
                    return
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self._refuse(507, f"{target}: {error.strerror}")
            return
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _receive(self, handle: int, length: int) -> bool:
        """Write the request's body to the file; False if the sender disconnected."""
        buffer = memoryview(bytearray(min(PIECE_BYTES, max(1, length))))
        while length:
            count = self.rfile.readinto(buffer[: min(len(buffer), length)])
            if not count:
                self.close_connection = True
                return False
            view = buffer[:count]
            while view:
                view = view[os.write(handle, view) :]
            length -= count
        return True

    def do_GET(self) -> None:
        match = self._admit()
        if match is None:
            return
        try:
            with open(self.server.store.folder / match[1] / match[5], "rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size
                start, count = self._range(whole)
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("Content-Length", str(count))
                self.end_headers()
                self.wfile.flush()
                if count:
                    self.connection.settimeout(self.timeout)
                    self.connection.sendfile(file, start, count)
        except FileNotFoundError:
            self._refuse(404, "not stored here")

    def _range(self, whole: int) -> tuple[int, int]:
        """Return first byte and number of requested bytes. whole: size of the file."""
        match = re.fullmatch(r"bytes=(\d{1,18})-(\d{1,18})", self.headers.get("Range", f"bytes=0-{whole - 1}"))
        if match is None:
            return 0, whole
        start = min(int(match[1]), whole)
        return start, max(0, min(int(match[2]) + 1, whole) - start)

    def _admit(self) -> re.Match[str] | None:
        """Match the request's path (/SET/FILE). For a wrong token or path, send an error and return None."""
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.server.store.token}".encode()):
            self._refuse(401, "wrong token")
            return None
        self.server.admit(self.connection)
        match = _PATH.fullmatch(self.path)
        if match is None:
            self._refuse(404, "no such path")
        return match

    def _refuse(self, code: int, why: str) -> None:
        self.close_connection = True  # the body was not read
        self.send_error(code, why)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing; the rank at the other end reports errors."""


class Peer:
    """A rank's connection to another node's store. Every method raises OSError."""

    def __init__(self, address: str, token: str, timeout: float):
        """Create the connection's settings. address: HOST:PORT of the store."""
        self._connection = http.client.HTTPConnection(address, timeout=timeout, blocksize=PIECE_BYTES)
        self._headers = {"Authorization": f"Bearer {token}"}

    def put(self, name: str, path: Path, keep: str) -> None:
        """Store the file `path` in the peer's set of copies `name`. The peer removes other sets of this and earlier
        attempts, except `keep`.
        """
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            headers = self._headers | {"X-Keep": keep, "Content-Length": str(length)}
            self._ask("PUT", f"/{name}/{path.name}", headers, file)

    def get(self, name: str, file: str) -> bytes:
        """Return the content of a file in the set of copies `name`."""
        return self._ask("GET", f"/{name}/{file}", self._headers)

    def read(self, name: str, file: str, view: memoryview, position: int) -> int:
        """Read a file of the set of copies `name` into `view`, from byte `position`. Returns the number of bytes."""
        headers = self._headers | {"Range": f"bytes={position}-{position + len(view) - 1}"}
        body = self._ask("GET", f"/{name}/{file}", headers)
        view[: len(body)] = body
        return len(body)

    def _ask(self, method: str, path: str, headers: dict[str, str], body: IO[bytes] | None = None) -> bytes:
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            text = response.read()
        except (http.client.HTTPException, OSError) as error:
            self._connection.close()
            raise OSError(f"{self._connection.host}: {error}") from error
        if response.status >= 300:
            self._connection.close()
            raise OSError(f"{self._connection.host} answers {response.status} {response.reason}")
        return text

    def close(self) -> None:
        self._connection.close()
