"""The command's reading and writing threads: order, bounds, errors."""

import threading
import time

import pytest

from uniflow.cli.workers import Workers


def test_reads_are_in_order_ahead_and_bounded():
    begun = []

    def read(i):
        begun.append(i)
        time.sleep(0.002 * (i % 3))
        return 10 * i

    with Workers(2) as workers:
        for i, value in enumerate(workers.read(read, range(20))):
            assert value == 10 * i
            assert max(begun) <= i + 5
    assert sorted(begun) == list(range(20))


def test_reading_goes_on_while_the_reader_is_busy():
    second = threading.Event()
    with Workers(1) as workers:
        values = workers.read(lambda i: second.set() if i == 1 else None, range(10))
        next(values)
        assert second.wait(10)


def test_leaving_waits_for_all_writes():
    done = []

    def write(i):
        time.sleep(0.01)
        done.append(i)

    with Workers(2) as workers:
        for i in range(9):
            workers.write(write, i)
            assert len(done) >= i - 5
    assert sorted(done) == list(range(9))


def test_errors_reach_the_caller():
    def fail(i):
        raise OSError(f"disk {i} is full")

    def write_many():
        with Workers(1) as workers:
            for i in range(100):
                workers.write(fail, i)

    def read_all():
        with Workers(1) as workers:
            list(workers.read(fail, [3]))

    def write_one():
        with Workers(1) as workers:
            workers.write(fail, 7)

    with pytest.raises(OSError, match="disk 0 is full"):
        write_many()
    with pytest.raises(OSError, match="disk 3 is full"):
        read_all()
    with pytest.raises(OSError, match="disk 7 is full"):
        write_one()


def test_an_error_ends_what_has_not_begun():
    begun, gate = [], threading.Event()

    def write(i):
        begun.append(i)
        gate.wait(10)

    def interrupted():
        with Workers(1) as workers:
            workers.write(write, 0)
            workers.write(write, 1)
            threading.Timer(0.05, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert begun == [0]
