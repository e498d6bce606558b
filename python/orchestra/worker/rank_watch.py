"""Threads that find out which rank is lost, and end the collectives that would wait for it for ever.

Rank 0 watches the others' pulses: the end of one is a dead process, known at once. A rank that hangs is found by the
clock: it owes the step, and for longer than such steps take neither enters a collective nor finishes, although it was
not kept waiting for a core, nor its core by the machine's host. The others watch rank 0's end, by which they learn of
everybody's loss.
"""

import contextlib
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.renewable_group import Progress, RenewableGroup
from orchestra.worker.starvation import Starvation

# How often pulses beat, and are looked at.
BEAT_S = 0.05
# A rank whose pulse is silent for so long does not run, whatever else it may be doing.
SILENT_S = 0.2
# A step may take so many times the longest that one like it took before.
SLACK = 8.0
# Share of a longest time that is left after another step of its kind: what was slow once is forgotten.
FADING = 0.98
# Longest time without progress, also of a step the like of which never ran before.
PATIENCE_MAX_S = 60.0
# How long the thread that computes may take to leave a step that was given up.
LEAVE_TIMEOUT_S = 10.0

_BEAT = struct.Struct("<QQ?")
# More than any rank beats between two looks; what is over is read by the next.
_READ_BYTES_MAX = 64 * _BEAT.size

logger = logging.getLogger("orchestra.worker")


class Patience:
    """How long a step may go without progress, learned from the steps before it.

    Args:
        least_s: the shortest time, below which nothing is ever taken for hung; 0: nothing ever is.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        # By powers of two of the tokens.
        self._slowest: dict[int, float] = {}

    def learn(self, num_tokens: int, slowest_round_s: float) -> None:
        """Takes in what a step of so many tokens has needed between two signs of life, seconds."""
        kind = num_tokens.bit_length()
        self._slowest[kind] = max(slowest_round_s, FADING * self._slowest.get(kind, 0.0))

    def of(self, num_tokens: int) -> float:
        """Seconds that a step of so many tokens may go without a sign of life."""
        if self._least_s <= 0.0:
            return math.inf
        kind = num_tokens.bit_length()
        # Twice the tokens take at most twice the time, so that smaller steps say something of larger ones.
        known = [slowest * 2.0 ** max(0, kind - it) for it, slowest in self._slowest.items()]
        if not known:
            return PATIENCE_MAX_S
        return min(max(SLACK * min(known), self._least_s), PATIENCE_MAX_S)


@dataclass
class _Pulse:
    """What is known of one rank."""

    progress: Progress = field(default_factory=lambda: Progress(0, 0, is_waiting=False))
    silent_s: float = 0.0
    """Time since it was heard of."""
    still_s: float = 0.0
    """Time since it got on with what it owes."""
    stood_s: float = 0.0
    """The same, without what starvation has excused."""
    unread: bytes = b""
    """The beginning of a beat."""

    def gets_on(self) -> None:
        """It has done something, or owes nothing."""
        self.still_s = self.stood_s = 0.0


class Watch(threading.Thread):
    """What both sides have in common: a thread that ends when a rank is lost, or when it is told to."""

    def __init__(self) -> None:
        super().__init__(name="orchestra-ranks", daemon=True)
        self._has_lost = threading.Event()
        self._wake, self._bell = socket.socketpair()

    def is_lost(self, timeout_s: float) -> bool:
        """Whether a rank is lost, or turns out to be within `timeout_s`."""
        return self._has_lost.wait(timeout_s)

    def stop(self) -> None:
        """Ends the thread, where it was started."""
        self._bell.send(b"\0")
        if self.ident is not None:
            self.join()
        self._wake.close()
        self._bell.close()


class LeaderWatch(Watch):
    """Rank 0's.

    Args:
        pulses: of the other ranks.
        group: whose collectives to end.
        patience: how long a step may stand still.
        on_hung: told of each rank that hangs, which is to be killed.
    """

    def __init__(
        self,
        pulses: Mapping[int, socket.socket],
        group: RenewableGroup,
        patience: Patience,
        on_hung: Callable[[int], None],
    ) -> None:
        super().__init__()
        self.lost: list[int] = []
        """The ranks that are gone or hang; written before `is_lost` says so."""
        self.lost_at = 0.0
        """When that was found, by the monotonic clock."""
        self._sockets = dict(pulses)
        self._pulses = {rank: _Pulse() for rank in pulses}
        self._group = group
        self._patience = patience
        self._on_hung = on_hung
        self._starvations = {rank: Starvation.of(pulse) for rank, pulse in pulses.items()}
        self._starvations[0] = Starvation.of_this()
        self._is_suspicious = False
        self._num_steps = 0
        # Of each step that the ranks were sent and rank 0 is not through with; replaced, since two threads look at it.
        self._in_flight: tuple[float, ...] = ()
        self._has_left = threading.Event()

    def begin_step(self, num_tokens: int) -> None:
        """The ranks were sent a step of so many tokens."""
        self._in_flight = (*self._in_flight, self._patience.of(num_tokens))
        self._num_steps += 1

    def end_step(self, num_tokens: int, slowest_round_s: float) -> None:
        """Rank 0 is through with the oldest of them, in which it needed so many seconds between two signs of life."""
        self._in_flight = self._in_flight[1:]
        self._patience.learn(num_tokens, slowest_round_s)

    def check(self) -> None:
        """Finds out, without waiting, whether every rank is still there.

        Raises:
            RankLostError: one is not.
        """
        if self._has_lost.is_set():
            raise RankLostError(f"ranks {self.lost} are gone")

    def left(self) -> None:
        """The thread that computes is out of the step that was given up."""
        self._has_left.set()

    def run(self) -> None:
        """Watches, until a rank is lost."""
        ranks = {connection.fileno(): rank for rank, connection in self._sockets.items()}
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for descriptor in ranks:
            poller.register(descriptor, select.POLLRDHUP)
        before = time.monotonic()
        while True:
            ready = [descriptor for descriptor, _ in poller.poll(BEAT_S * 1000)]
            if self._wake.fileno() in ready:
                return
            now = time.monotonic()
            # Time that this process itself did not get is nobody's fault.
            elapsed_s, before = min(now - before, 2 * BEAT_S), now
            lost = [ranks[descriptor] for descriptor in ready]
            hung = [] if lost else self._find_hung(elapsed_s)
            if lost or hung:
                self._give_up(lost + hung, hung)
                return

    def _find_hung(self, elapsed_s: float) -> list[int]:
        for rank, pulse in self._pulses.items():
            self._listen(rank, pulse, elapsed_s)
        in_flight = self._in_flight
        if not in_flight:
            return []
        # A step may have to wait for those before it.
        patience_s = sum(in_flight)
        owing = {r: p for r, p in self._pulses.items() if p.progress.num_steps < self._num_steps}
        still_s = max((pulse.still_s for pulse in owing.values()), default=0.0)
        if still_s <= patience_s / 2:
            self._is_suspicious = False
            return []
        if not self._is_suspicious:
            self._is_suspicious = True
            for starvation in self._starvations.values():
                starvation.begin()
        for starvation in self._starvations.values():
            starvation.look()
        return self._blame(owing) if still_s > patience_s else []

    def _listen(self, rank: int, pulse: _Pulse, elapsed_s: float) -> None:
        pulse.silent_s += elapsed_s
        pulse.still_s += elapsed_s
        pulse.stood_s += elapsed_s
        beats = pulse.unread
        with contextlib.suppress(OSError):
            # Its end is the poller's business.
            beats += self._sockets[rank].recv(_READ_BYTES_MAX, socket.MSG_DONTWAIT)
        whole = len(beats) - len(beats) % _BEAT.size
        pulse.unread = beats[whole:]
        if whole == 0:
            return
        pulse.silent_s = 0.0
        last = Progress(*_BEAT.unpack_from(beats, whole - _BEAT.size))
        if last != pulse.progress or last.num_steps >= self._num_steps:
            pulse.gets_on()
        pulse.progress = last

    def _blame(self, owing: Mapping[int, _Pulse]) -> list[int]:
        """Of the ranks that owe a step that stands still, those whose fault it is; none where they are starved."""
        stood_s = max(pulse.stood_s for pulse in owing.values())
        suspects = self._find_suspects(owing)
        is_starved = any(self._starvations[rank].is_starved() for rank in {*owing, *suspects})
        if is_starved and stood_s < PATIENCE_MAX_S:
            self._is_suspicious = False
            for pulse in owing.values():
                pulse.still_s = 0.0
            return []
        return suspects

    def _find_suspects(self, owing: Mapping[int, _Pulse]) -> list[int]:
        if silent := [rank for rank, pulse in owing.items() if pulse.silent_s > SILENT_S]:
            return silent
        # The others wait for whoever computes.
        if computing := [rank for rank, pulse in owing.items() if not pulse.progress.is_waiting]:
            return computing
        if not self._group.progress().is_waiting:
            return [0]
        return list(owing)

    def _give_up(self, lost: list[int], hung: list[int]) -> None:
        self.lost, self.lost_at = lost, time.monotonic()
        self._has_lost.set()
        for rank in hung:
            logger.warning("rank %s hangs", rank)
            self._on_hung(rank)
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._group.abort()
        if not self._has_left.wait(LEAVE_TIMEOUT_S):
            logger.error("the step that lost rank %s cannot be left", lost)
            logging.shutdown()
            os._exit(1)


class FollowerWatch(Watch):
    """The one of any other rank.

    Args:
        pulse: that rank 0 watches.
        group: whose collectives to end.
    """

    def __init__(self, pulse: socket.socket, group: RenewableGroup) -> None:
        super().__init__()
        self._pulse = pulse
        self._group = group

    def run(self) -> None:
        """Beats, until rank 0 parts."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._pulse, select.POLLRDHUP)
        while True:
            ready = {descriptor for descriptor, _ in poller.poll(BEAT_S * 1000)}
            if self._wake.fileno() in ready:
                return
            if ready or not self._beat():
                self._has_lost.set()
                self._group.abort()
                return

    def _beat(self) -> bool:
        progress = self._group.progress()
        beat = _BEAT.pack(progress.num_collectives, progress.num_steps, progress.is_waiting)
        try:
            self._pulse.send(beat, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # Rank 0 has not looked for minutes; it will find the older ones.
            return True
        except OSError:
            return False
        return True
