"""Liveness: every process beats in a store that all reach, and who hears nothing of another ends, with a line that names it.

It is no limit on how long a process may work: who waits for a download, an evaluation or a save beats on. Only a process that is
gone, stopped, or on a machine that is, falls silent.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

BEAT = 1.0  # seconds between two beats
SILENCE = 40.0  # seconds without one after which a process counts as dead
MEETING = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
LEFT = 2**40  # beats of one that has ended as it should


class Heartbeat(threading.Thread):
    """Beats for one process of `number`, and listens to the others; on_silence(message) is called once, by this thread.

    store: reached by all, and with a time limit of its own.
    """

    def __init__(self, store: dist.Store, rank: int, number: int, on_silence: Callable[[str], None]):
        super().__init__(daemon=True, name="heartbeat")
        self.store, self.rank, self.on_silence = store, rank, on_silence
        self.rounds, self.heard = 0, [0] * number
        self.silent = [0.0] * number  # seconds, counted while this process was awake itself
        self.left = threading.Event()
        store.set(f"host/{rank}", socket.gethostname())
        store.add(f"beats/{rank}", 1)

    def watch(self) -> None:
        """Beside run(), which waits for as long as whoever holds the store is frozen."""
        known, waited, last = self.rounds, 0.0, time.monotonic()
        while not self.left.wait(BEAT):
            now = time.monotonic()
            waited = waited + min(now - last, 2 * BEAT) if known == self.rounds else 0.0
            known, last = self.rounds, now
            if waited > SILENCE:
                self.on_silence(f"no answer for {SILENCE:.0f} s from {MEETING}, where the processes find one another")
                return

    def run(self) -> None:
        threading.Thread(target=self.watch, daemon=True).start()
        last, lost = time.monotonic(), 0
        while not self.left.wait(BEAT):
            try:
                self.store.add(f"beats/{self.rank}", 1)
                heard = [int(count) for count in self.store.multi_get([f"beats/{rank}" for rank in range(len(self.heard))])]
            except RuntimeError:  # of the library, for a lost connection as for its time limit
                lost += 1
                if lost == 3:  # not as soon as the process that holds the store has ended before this one
                    self.on_silence(f"{MEETING}, where the processes find one another, is gone or cannot be reached")
                    return
                continue
            self.rounds, lost = self.rounds + 1, 0
            now = time.monotonic()
            passed, last = min(now - last, 2 * BEAT), now
            for rank, count in enumerate(heard):
                quiet = count == self.heard[rank] and count < LEFT
                self.silent[rank] = self.silent[rank] + passed if quiet else 0.0
            self.heard = heard
            if max(self.silent) > SILENCE:
                self.on_silence(f"no sign of {self.silent_ones()} for {SILENCE:.0f} s: killed, stopped, or its machine is gone")
                return

    def silent_ones(self) -> str:
        """Those that were the first to fall silent, for people to read; empty if all are heard."""
        longest = max(self.silent)
        ranks = [rank for rank, silent in enumerate(self.silent) if silent >= max(longest - BEAT, 2 * BEAT)]
        try:
            return ", ".join(f"process {rank} on {self.store.get(f'host/{rank}').decode()}" for rank in ranks)
        except RuntimeError:
            return ", ".join(f"process {rank}" for rank in ranks)

    def leave(self) -> None:
        """The end, as it should be."""
        self.left.set()
        self.join()
        with suppress(RuntimeError):  # the store has left before
            self.store.add(f"beats/{self.rank}", LEFT)
