"""Computes the masks of grammars in threads, and gives up those that take too long.

llguidance has no limit of time, and its other limits do not replace one: an ambiguous grammar of 14 kB takes ten
seconds for one mask. Nothing can interrupt it. So the thread that steps the engine waits for other threads. A thread
with a mask that takes too long is left to itself, and another one takes its place.

Shapes: W words of 32 tokens each.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# The CPU time of a request in llguidance: so much for each mask, and so much in reserve. Other requests wait meanwhile.
SECONDS_OF_A_MASK, SECONDS_IN_RESERVE = 0.01, 1.0

_LOOK_SECONDS = 0.02  # how often the waiting thread looks for masks that take too long


class Allowance:
    """The CPU time that a request may still take for its texts in their grammar.

    Attributes:
        seconds: The time; less than 0 where the request has taken more.
    """

    def __init__(self) -> None:
        self.seconds = SECONDS_IN_RESERVE

    def spend(self, seconds: float, is_mask: bool = True) -> None:
        """Count the time that llguidance has taken, for a mask or for something else."""
        if self.seconds >= 0:
            more = SECONDS_OF_A_MASK if is_mask else 0.0
            self.seconds = min(SECONDS_IN_RESERVE, self.seconds + more - seconds)


@dataclass(eq=False)
class MaskTask:
    """A mask to compute.

    Attributes:
        matcher: An `llguidance.LLMatcher`. Nobody else uses it meanwhile, and nobody ever again after `is_given_up`.
        pointer: The address of W words that receive the mask.
        size: Bytes of these words.
        memory: What owns the words.
        allowance: Of its request.
        is_given_up: Whether the allowance did not suffice. The words then may change at any time.
        problem: What llguidance has raised.
    """

    matcher: Any
    pointer: int
    size: int
    memory: Any
    allowance: Allowance
    is_given_up: bool = False
    problem: Exception | None = None


class MaskWorkers:
    """Threads that compute masks.

    Args:
        count: Threads; by default 80 % of the CPUs, at most 32, as llguidance's own executor has.
    """

    def __init__(self, count: int | None = None) -> None:
        self._batches: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._lock = threading.Lock()
        if count is None:
            count = max(1, min(32, (os.cpu_count() or 1) * 4 // 5))
        self._workers = [_Worker(self._batches, self._lock) for _ in range(count)]

    def compute(self, tasks: Iterable[MaskTask]) -> None:
        """Compute masks. Returns once each is complete or given up. Any thread may call this."""
        batch = _Batch(tasks)
        busy = min(len(self._workers), len(batch.tasks))
        for _ in range(busy):
            self._batches.put(batch)
        while busy:
            try:
                batch.done.get(timeout=_LOOK_SECONDS)
                busy -= 1
            except queue.Empty:
                self._replace_slow_workers(batch)
        for task in batch.tasks:
            if task.problem is not None:
                raise task.problem

    def _replace_slow_workers(self, batch: _Batch) -> None:
        with self._lock:
            for place, worker in enumerate(self._workers):
                if worker.batch is batch and worker.task is not None and worker.takes_too_long():
                    worker.task.is_given_up = True
                    worker.task.allowance.seconds = -1.0
                    self._workers[place] = _Worker(self._batches, self._lock)
                    self._batches.put(batch)  # the new thread does the rest, and says when it is done


class _Batch:
    """Masks that are computed together."""

    def __init__(self, tasks: Iterable[MaskTask]) -> None:
        self.tasks = list(tasks)
        self.rest = deque(self.tasks)
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry of each thread that finds no rest


class _Worker(threading.Thread):
    def __init__(self, batches: queue.SimpleQueue[_Batch], lock: threading.Lock) -> None:
        super().__init__(name="masks", daemon=True)
        self._batches, self._lock = batches, lock
        # What the thread does at present, under the lock.
        self.batch: _Batch | None = None
        self.task: MaskTask | None = None
        self._begin = self._began = 0.0  # of the mask, in CPU time and in time
        self.start()

    def takes_too_long(self) -> bool:
        """Return whether the present mask has taken more CPU time than its request has."""
        assert self.ident is not None and self.task is not None
        if hasattr(time, "pthread_getcpuclockid"):
            seconds = time.clock_gettime(time.pthread_getcpuclockid(self.ident)) - self._begin
        else:  # macOS has no such clock of another thread
            seconds = time.monotonic() - self._began
        return seconds > self.task.allowance.seconds

    def run(self) -> None:
        """Compute masks until one is given up."""
        while True:
            batch = self._batches.get()
            while batch.rest:
                try:
                    task = batch.rest.popleft()
                except IndexError:  # another thread has just taken the last one
                    break
                if not self._compute(batch, task):
                    return
            batch.done.put(None)

    def _compute(self, batch: _Batch, task: MaskTask) -> bool:
        """Compute a mask; return whether this thread is still wanted."""
        begin = time.thread_time()
        with self._lock:
            if task.allowance.seconds < 0:
                task.is_given_up = True
                return True
            self.batch, self.task, self._begin, self._began = batch, task, begin, time.monotonic()
        try:
            task.matcher.unsafe_compute_mask_ptr(task.pointer, task.size)
        except Exception as problem:  # of any kind: the thread that waits raises it
            task.problem = problem
        seconds = time.thread_time() - begin
        with self._lock:
            self.batch = self.task = None
            if task.is_given_up:
                return False
            task.allowance.spend(seconds)
        return True
