"""The fair lock: order of asking, no overtaking by the thread that lets go, re-entrance."""

import threading

import pytest

from model.turns import FairLock
from tests import tiny
from tests.waiting import wait_until


def test_it_is_given_in_the_order_of_asking_and_nobody_overtakes():
    lock, order = FairLock(), []

    def ask(name):
        with lock:
            order.append(name)

    lock.acquire()
    threads = []
    for name in range(8):
        threads.append(threading.Thread(target=ask, args=(name,)))
        threads[-1].start()
        wait_until(lambda: len(lock) == len(threads))
    lock.release()
    with lock:  # asked for again at once, yet behind all who waited: a plain lock gives it to this thread
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == [*range(8), "again"] and len(lock) == 0


def test_the_holder_may_take_it_again_and_others_may_not():
    lock, found = FairLock(), []
    with lock, lock:
        thread = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
    assert found == [False]
    thread = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False) and lock.release() is None))
    thread.start()
    thread.join()
    assert found == [False, True]
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()


def test_one_at_a_time():
    lock, inside, most = FairLock(), [], []

    def work():
        for _ in range(200):
            with lock:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 1600


def test_the_device_is_given_by_it():
    assert isinstance(tiny.engine("hires")._lock, FairLock)
