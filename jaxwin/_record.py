# SPDX-License-Identifier: Apache-2.0
"""Problems written down while a program compiles: on request, and those that were missed.

Both kinds of files hold one JSON object per line, such as {"count": 3, "problem": {...}}, where
"problem" has the fields of `Problem.key`; in the file of missed problems also "threads", and for
GPUs "isa". They hold shapes and nothing else of a program. A line is added by one write under a
lock, so that many processes may add to one file.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import fcntl
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from jaxwin import _registry, _tuning
from jaxwin._problem import Problem

MISSES_BYTES = 256 * 1024  # of the file of missed problems, at most
_PAUSE_SECONDS = 1.0  # between a missed problem and its being written


# A problem without a tuned row: for how many threads; on GPUs for what its rows are filed under, an
# instruction set of CUDA's, which is empty on CPUs.
Missed = tuple[Problem, int, str]


def line(problem: Problem, count: int = 1, threads: int | None = None, isa: str = "") -> str:
    """A line of a file of problems."""
    more = "" if threads is None else f',"threads":{threads}'
    more += f',"isa":"{isa}"' if isa else ""
    return f'{{"count":{count}{more},"problem":{problem.key}}}\n'


def parse(text: str) -> tuple[Problem, int, int | None, str]:
    """(problem, count, threads, isa) of a line; where it has none 1, None and "".

    Raises:
        ValueError: it is no such line; one line of text says why.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or values.keys() - {"count", "problem", "threads", "isa"}:
        raise ValueError('not an object of "count" and "problem"')
    count, threads = values.get("count", 1), values.get("threads")
    for name, value in (("count", count), ("threads", threads)):
        if value is not None and (type(value) is not int or not 1 <= value < 2**62):
            raise ValueError(f"{name}: {value!r} is not a positive integer")
    isa = values.get("isa", "")
    if isa not in ("", *_registry.GPU_ISAS):
        raise ValueError(f"isa: {isa!r} is not one of {', '.join(_registry.GPU_ISAS)}")
    return Problem.from_key(json.dumps(values.get("problem"))), count or 1, threads, isa


# --- files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: str, mode: int) -> Iterator[int]:
    """A descriptor of a file, made if need be, which no other process holds at the same time."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: appending works, too
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(file), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:  # else another process has replaced it while this one waited
                yield file
                return
        finally:
            os.close(file)


def _append(file: int, data: bytes) -> None:
    """Adds whole lines: all of them or none."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":  # what somebody else left there
        data = b"\n" + data
    try:
        if os.write(file, data) != len(data):
            raise OSError("the disk is full")
    except OSError:
        os.ftruncate(file, size)
        raise


def append(path: str | os.PathLike[str], text: str) -> None:
    """Adds lines to a file, all or none.

    Raises:
        OSError: that cannot be done.
    """
    with _locked(os.fspath(path), 0o666) as file:
        _append(file, text.encode())


# --- on request ------------------------------------------------------------------------------


class Recording:
    """A recording under way, see `record`. `problems` has what it saw in this process so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: dict[Problem, int] = {}
        self._broken = False

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it. The file is complete at any time."""
        global recordings
        with _lock:
            recordings = tuple(other for other in recordings if other is not self)

    def _add(self, problem: Problem) -> None:
        self.problems[problem] = self.problems.get(problem, 0) + 1
        if self._broken:
            return
        try:
            append(self.path, line(problem))
        except OSError as error:  # the program itself must go on
            self._broken = True
            warnings.warn(
                f"jaxwin: problems are not recorded any more: {self.path}: {error.strerror}",
                RuntimeWarning,
                stacklevel=2,
            )


_lock = threading.RLock()
recordings: tuple[Recording, ...] = ()  # those under way
_by_variable: dict[str, Recording] = {}


def record(path: str | os.PathLike[str]) -> Recording:
    """Adds every convolution that this process compiles from now on to a file.

    A context manager, which ends the recording; without `with`, `close()` ends it, or the process.
    `jaxwin-tune run --from FILE` tunes what the file holds.

        with jaxwin.record("shapes.jsonl") as seen:
            train_step(state, batch)
        print(len(seen.problems), "different convolutions")

    A convolution is seen when a program that contains it is lowered, so a function that was
    compiled before `record` is not seen: record before its first call. The body of a loop counts
    once, however often it runs. `jaxwin-tune record -- COMMAND`, or the variable JAXWIN_RECORD,
    records a whole program with all its processes.

    path: the file; what it holds already stays. Each line is a JSON object
    {"count": 1, "problem": {...}} that describes the shapes of one convolution and nothing else;
    counts of equal problems add up.

    Raises:
        OSError: the file cannot be written.
    """
    global recordings
    recording = Recording(Path(path).absolute())
    append(recording.path, "")
    with _lock:
        recordings = (*recordings, recording)
    return recording


def note(problem: Problem, named: str) -> None:
    """Records a problem that is compiled; `named` is what JAXWIN_RECORD says."""
    with _lock:
        for recording in recordings:
            recording._add(problem)
        if named:
            if named not in _by_variable:
                _by_variable[named] = Recording(Path(named).absolute())
            _by_variable[named]._add(problem)


# --- missed problems -------------------------------------------------------------------------

_missed: list[Missed] = []  # not yet written
_timer: threading.Timer | None = None
_ignored = 0


def misses_file() -> Path | None:
    """Where missed problems are remembered; None where there is no home."""
    user = _tuning.user_file()
    return None if user is None else user.with_name("missed.jsonl")


def miss(problem: Problem, threads: int, isa: str = "") -> None:
    """Remembers that a problem with so many threads had no tuned row; isa: one of CUDA's, or "".

    It is written a second later, or when the process ends, by a thread: dispatch does not wait.
    """
    global _timer
    if _ignored:
        return
    _missed.append((problem, threads, isa))
    if _timer is None:
        with _lock:
            if _timer is None:
                _timer = threading.Timer(_PAUSE_SECONDS, flush_misses)
                _timer.daemon = True
                _timer.start()


@contextlib.contextmanager
def misses_ignored() -> Iterator[None]:
    """Inside, no missed problem is remembered: what a tool compiles is no program's."""
    global _ignored
    _ignored += 1
    try:
        yield
    finally:
        _ignored -= 1


@atexit.register
def flush_misses() -> None:
    """Writes what was missed so far, if it can be written."""
    global _missed, _timer
    with _lock:
        if _timer is not None:
            _timer.cancel()
        _timer = None
        missed, _missed = _missed, []
    path = misses_file()
    if not missed or path is None:
        return
    counts = collections.Counter(missed)
    text = "".join(line(p, n, threads, isa) for (p, threads, isa), n in counts.items())
    try:
        os.makedirs(path.parent, 0o700, exist_ok=True)
        with _locked(str(path), 0o600) as file:
            if os.fstat(file).st_size + len(text) > MISSES_BYTES:
                _rewrite(file, path, _sum([*_read(file), *text.splitlines()]))
            else:
                _append(file, text.encode())
    except OSError:
        return  # a home that is read-only or full: `jaxwin-tune doctor` says so


def _forked() -> None:
    """In a child the parent's timer does not run, and the parent writes what it missed."""
    global _missed, _timer, _lock
    _missed, _timer, _lock = [], None, threading.RLock()


os.register_at_fork(after_in_child=_forked)


def _read(file: int) -> list[str]:
    data = os.pread(file, os.fstat(file).st_size, 0)
    return data.decode("utf-8", "replace").splitlines()


def _sum(lines: Iterable[str]) -> dict[Missed, int]:
    """The problems of some lines; those that make no sense are left out."""
    counts: dict[Missed, int] = {}
    for text in lines:
        try:
            problem, count, threads, isa = parse(text)
        except (ValueError, RecursionError):
            continue  # a torn line, or one of another version
        key = problem, threads or 1, isa
        counts[key] = counts.get(key, 0) + count
    return counts


def _rewrite(file: int, path: Path, counts: dict[Missed, int]) -> None:
    """Replaces the file by one line per problem: the most frequent ones, that fill half of it."""
    lines, size = [], 0
    for (problem, threads, isa), count in sorted(counts.items(), key=lambda item: -item[1]):
        text = line(problem, count, threads, isa)
        if size + len(text) > MISSES_BYTES // 2:
            break
        lines.append(text)
        size += len(text)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.writelines(lines)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def misses() -> dict[Missed, int]:
    """How often each problem was missed, by all programs of this user.

    Raises:
        OSError: the file is there and cannot be read.
    """
    flush_misses()
    path = misses_file()
    try:
        text = "" if path is None else path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return {}
    return _sum(text.splitlines())


def forget(problems: Iterable[Missed]) -> None:
    """Takes problems out of the file of missed ones, those of all other processes kept.

    Raises:
        OSError: the file cannot be written.
    """
    gone = set(problems)
    path = misses_file()
    if not gone or path is None or not path.exists():
        return
    with _locked(str(path), 0o600) as file:
        counts = _sum(_read(file))
        _rewrite(file, path, {key: n for key, n in counts.items() if key not in gone})
