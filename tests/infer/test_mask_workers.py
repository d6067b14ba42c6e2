"""Masks are computed in threads. One that takes too long is given up, and delays no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from llama_te_infer.runner.mask_workers import SECONDS_IN_RESERVE, SECONDS_OF_A_MASK, Allowance, MaskTask, MaskWorkers


class Matcher:
    """Does as it is told in place of a mask."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.calls = 0

    def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
        assert (pointer, size) == (8, 4)
        self.calls += 1
        self.work()


def task_of(work: Callable[[], None], seconds: float = 60, allowance: Allowance | None = None) -> MaskTask:
    if allowance is None:
        allowance = Allowance()
        allowance.seconds = seconds
    return MaskTask(Matcher(work), 8, 4, None, allowance)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("masks", [0, 1, 2, 50])
def test_each_mask_is_computed_once(count: int, masks: int) -> None:
    workers = MaskWorkers(count)
    for _ in range(20):
        tasks = [task_of(lambda: None) for _ in range(masks)]
        workers.compute(tasks)
        assert all(task.matcher.calls == 1 and not task.is_given_up for task in tasks)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("has_clocks", [True, False], ids=["clocks of threads", "no clocks of threads"])
def test_masks_that_take_too_long_are_given_up(count: int, has_clocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_clocks:
        monkeypatch.delattr(time, "pthread_getcpuclockid")
    workers, stop = MaskWorkers(count), threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    for _ in range(2):
        slow = [task_of(spin, 0.05) for _ in range(2)]
        quick = [task_of(lambda: None) for _ in range(9)]
        begin = time.monotonic()
        workers.compute([*quick[:3], slow[0], *quick[3:6], slow[1], *quick[6:]])
        assert time.monotonic() - begin < 10
        assert all(task.is_given_up for task in slow)
        assert all(task.matcher.calls == 1 and not task.is_given_up for task in quick)
    stop.set()
    workers.compute([task_of(lambda: None) for _ in range(9)])
    for _ in range(200):  # the threads that were given up end
        if sum(thread.name == "masks" and thread in workers._workers for thread in threading.enumerate()) == count:
            break
        time.sleep(0.05)
    assert len(workers._workers) == count and all(worker.is_alive() for worker in workers._workers)


def test_waiting_is_no_work() -> None:
    """A mask whose thread gets no CPU for a while, as on a busy machine, is not given up."""
    task = task_of(lambda: time.sleep(0.3), 0.05)
    MaskWorkers(1).compute([task])
    assert not task.is_given_up and task.allowance.seconds > 0


def test_what_llguidance_raises_is_raised() -> None:
    def fail() -> None:
        raise RuntimeError("Already borrowed")

    workers = MaskWorkers(1)
    with pytest.raises(RuntimeError, match="Already borrowed"):
        workers.compute([task_of(fail), task_of(lambda: None)])
    workers.compute([task_of(lambda: None)])


def test_several_threads_may_compute_at_the_same_time() -> None:
    workers, every = MaskWorkers(2), [[task_of(lambda: time.sleep(0.001)) for _ in range(20)] for _ in range(4)]
    threads = [threading.Thread(target=workers.compute, args=(tasks,)) for tasks in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert all(task.matcher.calls == 1 for tasks in every for task in tasks)


def test_the_masks_of_a_request_share_its_time() -> None:
    workers, stop, shared = MaskWorkers(2), threading.Event(), Allowance()
    shared.seconds = 0.05

    def spin() -> None:
        while not stop.is_set():
            pass

    tasks = [task_of(spin, allowance=shared) for _ in range(20)]
    workers.compute(tasks)
    stop.set()
    assert all(task.is_given_up for task in tasks) and sum(task.matcher.calls for task in tasks) <= 2


def test_quick_masks_save_time_up_to_the_reserve() -> None:
    allowance = Allowance()
    for _ in range(10):
        allowance.spend(0)
    assert allowance.seconds == SECONDS_IN_RESERVE
    allowance.spend(0.5)
    assert allowance.seconds == SECONDS_IN_RESERVE + SECONDS_OF_A_MASK - 0.5
    allowance.spend(5)
    assert allowance.seconds < 0
    allowance.spend(0)
    assert allowance.seconds < 0, "it stays exhausted"
