"""A thread on each rank that notices when another one has failed, is gone or no longer answers.

A rank that waits in a collective for one that is gone waits until the collective's timeout, on a GPU often for ever. So
each rank leaves a sign of life in the rendezvous store every second, and the reason where it fails; and each looks at
the others'. What is found is told to the main thread, which usually meets a broken connection at the same time; where
it stays stuck, the process is ended with one sentence that names the rank.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

INTERVAL_SECONDS = 1.0
PAUSE_SECONDS = 5.0
"""Between two looks of one rank: longer, and it was itself suspended (a scheduler's SIGSTOP, a machine that slept)."""
GRACE_SECONDS = 15.0
"""From finding a failure to ending a process whose main thread did not come out of it by itself."""


@dataclass(frozen=True)
class Peer:
    """Where a rank runs."""

    host: str
    pid: int


class Watch:
    """Signs of life of one rank, and its look at the others'.

    Args:
        store: of torch.distributed, for this thread alone, with a prefix of this start.
        silence_seconds: a rank without a sign for so long is taken for lost.
    """

    def __init__(self, store: Any, rank: int, peers: list[Peer], silence_seconds: float) -> None:
        self.store, self.rank, self.peers, self.silence_seconds = store, rank, peers, silence_seconds
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._found: tuple[int, str] | None = None
        self._beats = [(b"", time.monotonic()) for _ in peers]
        self._thread = threading.Thread(target=self._run, name="watch-ranks", daemon=True)
        self._beat(0)

    def start(self) -> None:
        """Begin, once every rank has given its first sign."""
        self._thread.start()

    def stop(self) -> None:
        """End it; the rank is then neither watched nor watching."""
        self._stopped.set()

    def announce(self, sentence: str) -> int:
        """Tell the others that this rank fails; return the rank that was first to say so, and is the one they name."""
        self._stopped.set()
        try:
            with self._lock:
                first = self.store.compare_set("failed", "", f"{self.rank} {sentence}"[:2000])
            return int(first.decode().partition(" ")[0])
        except (RuntimeError, ValueError):
            return self.rank  # the store is gone, and with it the others

    def failure(self, wait_seconds: float) -> tuple[int, str] | None:
        """Return (rank, sentence) of what has befallen another rank, looking for so long; None: nothing is known."""
        until = time.monotonic() + wait_seconds
        while self._found is None and time.monotonic() < until:
            self._look()
            time.sleep(0.1)
        self._stopped.set()
        return self._found

    def speaker(self, lost: int) -> int:
        """Return the rank that says it: the lowest that is not the lost one; each, where it is the rendezvous."""
        return self.rank if lost < 0 else 1 if lost == 0 else 0

    def _run(self) -> None:
        number, looked = 0, time.monotonic()
        while not self._stopped.wait(INTERVAL_SECONDS):
            number += 1
            now = time.monotonic()
            if now - looked > PAUSE_SECONDS:
                # This process itself was stopped, and with it perhaps all of them: nobody's silence counts.
                self._beats = [(beat, now) for beat, _since in self._beats]
            looked = now
            self._beat(number)
            self._look()
            if self._found is not None and not self._stopped.wait(GRACE_SECONDS):
                rank, sentence = self._found
                if self.rank == self.speaker(rank):
                    os.write(2, f"\nekiden: {sentence}\n".encode())
                os._exit(1)

    def _beat(self, number: int) -> None:
        try:
            with self._lock:
                self.store.set(f"beat/{self.rank}", str(number))
        except RuntimeError:
            self._store_lost()

    def _look(self) -> None:
        """Read what the others left; remember the first failure."""
        if self._look_for_dead():
            return
        try:
            with self._lock:
                if self.store.check(["failed"]):
                    rank, _, sentence = self.store.get("failed").decode().partition(" ")
                    self._note(int(rank), f"rank {rank} failed: {sentence}")
                    return
                beats = self.store.multi_get([f"beat/{rank}" for rank in range(len(self.peers))])
        except RuntimeError:
            self._store_lost()
            return
        now = time.monotonic()
        for rank, (peer, beat) in enumerate(zip(self.peers, beats)):
            before, since = self._beats[rank]
            if beat != before:
                self._beats[rank] = (beat, now)
            elif now - since > self.silence_seconds:
                self._note(rank, f"{_place(rank, peer)} has not answered for {now - since:.0f} seconds")

    def _look_for_dead(self) -> bool:
        """Note a rank of this machine whose process is gone; return whether anything is known now."""
        for rank, peer in enumerate(self.peers):
            if peer.host == socket.gethostname() and not _alive(peer.pid):
                self._note(rank, f"{_place(rank, peer)} was ended from outside")
        return self._found is not None

    def _store_lost(self) -> None:
        # It ends with rank 0 or torchrun's agent; a process that has just died is still there for a moment.
        time.sleep(0.5)
        if not self._look_for_dead():
            self._note(-1, "the rendezvous (torchrun's agent, or rank 0) cannot be reached any more")

    def _note(self, rank: int, sentence: str) -> None:
        if self._found is None and not self._stopped.is_set() and rank != self.rank:
            self._found = (rank, f"{sentence}; the other ranks stopped, run the same command again")


def _place(rank: int, peer: Peer) -> str:
    return f"rank {rank} (process {peer.pid} on {peer.host})"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
