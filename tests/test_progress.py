"""Progress: lines at fixed times with the time left, bars on a terminal, nothing from other processes of torchrun."""

import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from coalign import progress as module
from coalign.progress import bars, drawn_elsewhere, progress, track, waiting


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(module, "_clock", lambda: now[0])
    return now


def test_lines_come_after_three_seconds_and_every_half_minute(clock, capsys):
    times = []
    with progress("Reading", 1000, "images") as task:
        for second in range(1, 101):
            clock[0] += 1
            task.update(10 * second)
            if printed := capsys.readouterr().err:
                times.append((second, printed))
    assert [second for second, _ in times] == [3, 33, 63, 93]
    assert times[0][1] == "Reading: 30 of 1,000 images, 1 min 37 s left\n"
    assert times[1][1] == "Reading: 330 of 1,000 images, 1 min 7 s left\n"


def test_short_work_prints_nothing(clock, capsys):
    assert list(track(range(5), "Reading")) == [0, 1, 2, 3, 4]
    with waiting("Thinking"):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_estimated_from_where_the_total_became_known(clock, capsys):
    """Steps that an earlier process has done took no time in this one."""
    with progress("clip: preparing", unit="steps") as task:
        clock[0] += 20
        task.update(500, 1000, "clip: training")
        capsys.readouterr()
        clock[0] += 40
        task.update(510)
    assert capsys.readouterr().err == "clip: training: 510 of 1,000 steps, 32 min 40 s left\n"


def test_what_another_process_says_of_itself_is_shown_as_it_is(clock, capsys):
    with progress("clip: preparing", unit="steps") as task:
        clock[0] += 5
        task.update(0, what="clip: features of images", state="416 of 1,824, 1 min 57 s left")
        clock[0] += 40
        task.update(5, 10, "clip: training")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["clip: features of images: 416 of 1,824, 1 min 57 s left", "clip: training: 5 of 10 steps"]


def test_what_cannot_tell_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(module, "_FIRST_SECONDS", 0.05)
    with waiting("Projecting"):
        time.sleep(0.5)
    assert capsys.readouterr().err == "Projecting …\n"


def test_items_without_a_length_are_counted(clock, capsys):
    for _ in track(iter(range(4)), "Listing", unit="files"):
        clock[0] += 2
    assert capsys.readouterr().err == "Listing: 2 files\n"


def test_only_the_first_process_of_torchrun_prints(clock, capsys, monkeypatch, every_update):
    monkeypatch.setenv("RANK", "1")
    assert list(track(range(5), "Reading")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_an_abandoned_or_failed_loop_leaves_no_bar(monkeypatch):
    monkeypatch.setattr(module, "_BAR_SECONDS", 0.0)
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    console = Console(file=io.StringIO(), width=100)

    def fail():
        with progress("Reading", 10) as task:
            task.update(1)
            raise ValueError("no")

    with drawn_elsewhere():
        with pytest.raises(ValueError, match="no"):
            fail()
        for number in track(range(10), "Writing"):
            if number == 2:
                console.print(bars())
                break
        console.print(bars())
    assert console.file.getvalue().count("Writing") == 1
    assert "2 of 10" in console.file.getvalue()
    assert "Reading" not in console.file.getvalue()


SCRIPT = """
import threading, time
from coalign import progress
progress._BAR_SECONDS = 0.0

def work(name):
    for _ in progress.track(range(6), name):
        time.sleep(0.3)

threads = [threading.Thread(target=work, args=(name,)) for name in ("clip", "mcd")]
[thread.start() for thread in threads]
time.sleep(1)
print("a line of output", flush=True)
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("redirected", [False, True])
def test_bars_of_several_threads_on_a_terminal(tmp_path, redirected):
    """Output goes above the bars or, if it is redirected, to its file."""
    ours, theirs = pty.openpty()
    with open(tmp_path / "out", "wb") as file:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=file if redirected else theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the terminal is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait(60) == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    assert re.search(r"clip .*3 of 6, \d s left\s+mcd .*3 of 6|mcd .*3 of 6, \d s left\s+clip .*3 of 6", text)
    assert ("a line of output" in text) is not redirected
    assert (tmp_path / "out").read_text() == ("a line of output\n" if redirected else "")
