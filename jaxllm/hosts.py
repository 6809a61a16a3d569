"""Several processes, one on each host, that run the same program over one mesh: how they join, and how they all end.

JAX's coordination service lets them find one another. But when one of them dies, the others stand in a collective until
a heartbeat is missed, and are then aborted. So each also holds a connection to process 0, which breaks as soon as its
process ends: then every other says so in one line on stderr, and ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # JAX has no public name for the store of keys and values that the processes share
from jax.experimental import multihost_utils

JOIN_S = 300  # hosts of a slice are started one after the other
LOST_S = 60  # after which a process that stands still, or whose machine has vanished, is given up
PART_S = 60  # how far the ends of the processes may lie apart
_NEWS_S = 1.0  # what fails here may come from a lost process, and the news of it a moment later
_LATER_S = 60  # JAX's own timer, which aborts without saying why, comes after ours
_KEY = "jaxllm/hosts"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among `count`. coordinator: "ADDRESS:PORT" of process 0, a port that is free there."""

    coordinator: str
    count: int
    index: int

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536 or not 0 <= self.index < self.count:
            raise ValueError(
                f"{self} is no place; expected the coordinator as ADDRESS:PORT, and an index from 0 to count - 1."
            )


def join(place: Place | None = None, *, timeout_s: int = JOIN_S) -> Group:
    """Joins the processes that run the same program: `with hosts.join(): ...`, before anything else of JAX.

    place: None where JAX finds it by itself: on Cloud TPU slices, and under Slurm and MPI.
    timeout_s: how long to wait for all of them. When it is over, the process ends as a `Group`'s does.

    Raises ValueError when no place is given and JAX finds none, RuntimeError when process 0 cannot listen at its port,
    is not reached, or runs other versions of jaxllm, JAX or Python.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    where = "" if place is None else f" at {place.coordinator}"
    late = f"The other processes did not all come{where} within {timeout_s} s. Start the same command on every host."
    timer = threading.Timer(timeout_s, _end, [late])
    timer.daemon = True
    timer.start()
    state = distributed.global_state
    try:
        jax.distributed.initialize(
            *((None, None, None) if place is None else (place.coordinator, place.count, place.index)),
            cluster_detection_method=None if place is None else "deactivate",
            initialization_timeout=timeout_s + _LATER_S,
            heartbeat_timeout_seconds=LOST_S,
            shutdown_timeout_seconds=PART_S,
        )
        return Group(state.process_id, state.num_processes, _connect(state, timeout_s))
    except ValueError as error:
        raise ValueError(f"JAX does not find the other hosts here ({error}); say where process 0 is.") from error
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"This process cannot join the others{where}: {error}") from error
    finally:
        timer.cancel()


class Group:
    """The processes that joined, for as long as a `with` block lasts; made by `join`.

    index: this process's. count: of all.

    They end together. When an exception leaves the block in one of them, or one is killed, all end within seconds, and
    within LOST_S where a machine vanished or a process stands still: each writes one line to stderr and leaves at
    once, without unwinding, because its main thread may stand in a collective that never returns. The code is 1, or
    130 after an interrupt.
    """

    def __init__(self, index: int, count: int, peers: dict[int, _Peer]):
        self.index, self.count = index, count
        self._peers = peers
        for peer in peers:
            threading.Thread(target=self._listen, args=[peer], daemon=True).start()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._tell({"parts": True})
            jax.distributed.shutdown()  # waits for the others
            return
        if isinstance(error, Exception):
            time.sleep(_NEWS_S)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        line, code = _line(error)
        self._tell({"failed": f"Process {self.index} of {self.count} failed: {line.splitlines()[-1]}"})
        _end(line, code)

    def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
        for peer, it in self._peers.items():
            if peer != but:
                with contextlib.suppress(OSError):
                    it.connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, peer: int) -> None:
        it, parts, why = self._peers[peer], False, ""
        with contextlib.suppress(OSError, ValueError):  # what breaks, in a connection or a word, says as much as an end
            for line in it.lines:
                message = json.loads(line)
                parts |= "parts" in message
                if why := message.get("failed", ""):
                    break
        if parts and not why:
            return
        why = why or (
            f"Process {peer} of {self.count} (on {it.host}) is gone: killed, out of memory, or its machine was lost. "
            "See what it said last, and start all again."
        )
        self._tell({"failed": why}, but=peer)
        _end(why)


def require_same(what: str, value: Any) -> None:
    """Raises ValueError where other processes have another value: collectives over them would hang, or mix up models.

    value: anything whose repr says all of it. To be called by every process at the same point.
    """
    mine = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
    all_PB = multihost_utils.process_allgather(mine)
    if others := np.flatnonzero((all_PB != all_PB[0]).any(1)).tolist():
        raise ValueError(
            f"{what[:1].upper()}{what[1:]} differ among the processes: {others} differ from process 0. "
            "Run the same command, on the same files, on every host."
        )


class _Peer:
    """A process that this one talks to."""

    def __init__(self, host: str, connection: socket.socket):
        self.host, self.connection = host, connection
        self.lines = connection.makefile(encoding="utf-8")  # one for good: it reads ahead
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # So that it breaks, though nothing is sent, where the other machine is no longer there.
        for option, value in {"TCP_KEEPIDLE": LOST_S // 3, "TCP_KEEPINTVL": LOST_S // 6, "TCP_KEEPCNT": 4}.items():
            if hasattr(socket, option):  # not by this name everywhere
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _connect(state: Any, timeout_s: float) -> dict[int, _Peer]:
    """By index: process 0 talks to all, the others to it."""
    address, _, _ = state.coordinator_address.rpartition(":")
    address = address.strip("[]")
    versions = [importlib.metadata.version("jaxllm"), jax.__version__, platform.python_version()]
    if state.process_id > 0:
        port, token, theirs = json.loads(state.client.blocking_key_value_get(_KEY, int(timeout_s * 1000)))
        if theirs != versions:
            raise RuntimeError(f"versions are {versions} here and {theirs} at process 0.")
        first = _Peer(address, socket.create_connection((address, port), timeout_s))
        first.connection.settimeout(None)
        first.connection.sendall(json.dumps([token, state.process_id, platform.node()]).encode() + b"\n")
        return {0: first}
    peers: dict[int, _Peer] = {}
    both = socket.has_dualstack_ipv6()
    with socket.create_server(
        ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=state.num_processes
    ) as server:
        token = secrets.token_hex(16)
        state.client.key_value_set(_KEY, json.dumps([server.getsockname()[1], token, versions]))
        while len(peers) < state.num_processes - 1:
            it = _Peer("", server.accept()[0])
            with contextlib.suppress(OSError, ValueError, TypeError):  # of a stranger
                it.connection.settimeout(5)
                said, peer, it.host = json.loads(it.lines.readline(1024))
                it.connection.settimeout(None)
                if secrets.compare_digest(said, token):
                    peers[peer] = it
    return peers


def _line(error: BaseException) -> tuple[str, int]:
    """What to say of an exception, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, SystemExit):
        return f"ended with {error.code!r}", error.code if isinstance(error.code, int) else 1
    expected = isinstance(error, ValueError | OSError | RuntimeError | MemoryError)
    text = str(error) or type(error).__name__
    if expected and not os.environ.get("JAXLLM_DEBUG"):
        return text, 1
    return "".join(traceback.format_exception(error)) + text, 1


_last_word = threading.Lock()


def _end(text: str, code: int = 1) -> NoReturn:
    _last_word.acquire()  # for ever: one word is enough
    os.write(2, f"jaxllm: error: {text}\n".encode(errors="replace"))
    os._exit(code)
