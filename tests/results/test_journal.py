"""The journal: whole lines or nothing, whatever happens in between."""

import errno
import json
import os
import signal
import threading

import pytest

from paretorch.errors import StudyError
from paretorch.results.journal import Journal, locked, undisturbed


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "trials.jsonl")


def test_what_was_appended_is_read(journal):
    records = [{"number": i, "text": "Größe\n\u2028" * i, "value": float(i)} for i in range(5)]
    assert journal.read() == []
    for record in records:
        journal.append(record)
    assert journal.read() == records
    assert len(journal.path.read_bytes().splitlines()) == 5


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_a_torn_line_is_cut_off_by_the_writer_alone(journal, cut):
    journal.append({"number": 0})
    journal.append({"number": 1, "text": "x" * 20})
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    assert journal.read() == [{"number": 0}]
    assert journal.path.read_bytes() == whole[:-cut], "who looks at a study that runs must not change it"
    assert journal.read(mend=True) == [{"number": 0}]
    journal.append({"number": 1})
    assert journal.read() == [{"number": 0}, {"number": 1}]


@pytest.mark.parametrize("line", ["{", "[1]", "", "\x00\x00"])
def test_a_damaged_line_is_named(journal, line):
    journal.path.write_text(f'{{"number": 0}}\n{line}\n{{"number": 2}}\n')
    with pytest.raises(
        StudyError, match=r"trials\.jsonl:2 is damaged .*restore the file from a backup, or move the study's"
    ):
        journal.read()


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_full_disk_leaves_the_lines_before(journal, monkeypatch, failing):
    journal.append({"number": 0})
    before = journal.path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    if failing == "fsync":  # no argument could say it: the operating system's own call fails
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="No space left"):
            journal.append({"number": 1})
        monkeypatch.undo()
    else:  # really: a file that may not grow takes a part of the line and refuses the rest
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                journal.append({"number": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert journal.path.read_bytes() == before
    journal.append({"number": 1})
    assert [record["number"] for record in journal.read()] == [0, 1]


def test_an_interrupt_while_writing_leaves_the_lines_before(journal, monkeypatch):
    journal.append({"number": 0})

    def interrupted(descriptor):
        raise KeyboardInterrupt

    # Stands for Ctrl-C while the operating system writes, at a moment that no argument could give.
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.append({"number": 1})
    assert journal.read() == [{"number": 0}]


def test_one_holder_at_a_time(tmp_path):
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text()) == os.getpid()
        with pytest.raises(StudyError, match=rf"in use by another search \(process {os.getpid()}\)"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_lock_that_went_with_its_folder_is_made_anew(tmp_path, monkeypatch):
    """The holder before has removed the file between our opening it and our locking it."""
    import fcntl

    flock, times = fcntl.flock, []

    def late(stream, how):
        if not times:
            (tmp_path / ".lock").unlink()
        times.append(how)
        flock(stream, how)

    # Stands for another process between two calls to the operating system, a moment that no argument could give.
    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        with pytest.raises(StudyError), locked(tmp_path):
            pass
    assert len(times) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number):
    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, handler)
    done = []

    @undisturbed()
    def work(signals):
        for _ in range(signals):
            os.kill(os.getpid(), number)
        done.append(signals)

    try:
        for signals in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                work(signals)
            assert signal.getsignal(number) is handler
        assert done == [1], "a second one comes through"
    finally:
        signal.signal(number, before)


def test_an_error_in_the_block_goes_before_the_signal():
    @undisturbed()
    def work():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        work()


def test_blocks_inside_blocks_and_other_threads():
    done = []

    @undisturbed()
    def work():
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("inner")
        done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]

    def elsewhere():
        with undisturbed():
            done.append("thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done[-1] == "thread"
