"""KeyboardInterrupt before one line of effdense's Python after the other, as Ctrl-C would come; `python -m tests.engine._faults.interrupts` does all."""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import effdense

PACKAGE = str(Path(effdense.__file__).parent)


class Line(NamedTuple):
    """A line of a file."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file.removeprefix(PACKAGE + '/')}:{self.number}"


class Lines:
    """Notes the lines of some files that run, and raises KeyboardInterrupt before the one of a number.

    Args:
        at: the number, from 0; below it: no line.
        files: what the files' paths begin with.
    """

    def __init__(self, at: int = -1, files: Sequence[str] = (PACKAGE,)) -> None:
        self.at, self.files = at, tuple(files)
        self.seen: list[Line] = []
        self.where: Line | None = None  # before which it was raised

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        return functools.partial(self._line, set())

    def _line(self, entered: set[int], frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self._leaves(entered, frame):
            self.seen.append(Line(frame.f_code.co_filename, frame.f_lineno))
            self._met(len(self.seen) - 1)
        return functools.partial(self._line, entered)

    def _met(self, number: int) -> None:
        if number == self.at:
            self.where = self.seen[-1]
            raise KeyboardInterrupt(str(self.where))

    def _leaves(self, entered: set[int], frame: FrameType) -> bool:
        """Whether it is a `with` that ends, whose line comes a second time: there Python looks for no signals."""
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        again = frame.f_lineno in entered
        entered.symmetric_difference_update({frame.f_lineno})
        return again

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it lines count."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)


class _Forks(Lines):
    """Lets a child go on with KeyboardInterrupt before each line of these numbers, and waits for what it says."""

    def __init__(self, numbers: Sequence[int], files: Sequence[str]) -> None:
        super().__init__(-1, files)
        self._numbers, self.results = set(numbers), list[Tried]()
        self.child: int | None = None  # where a child writes

    def _met(self, number: int) -> None:
        if number not in self._numbers or self.child is not None:
            return
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read)
            self.child, self.where = write, self.seen[-1]
            raise KeyboardInterrupt(str(self.where))
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        problem = said if status == 0 else f"the process ended with {status}"
        self.results.append(Tried(number, str(self.seen[-1]), problem))


class Part(Protocol):
    """Something that is interrupted; `forks`: it takes so long that a child is interrupted at each line, and all goes on."""

    files: Sequence[str]
    forks: bool

    def prepare(self) -> None:
        """Makes what `act` needs, always the same."""

    def act(self) -> None:
        """What is interrupted."""

    def check(self, thoroughly: bool = True) -> None:
        """Raises AssertionError where something is neither as before `act` nor as after it, or does not go on.

        `thoroughly`: also what takes half a second, after one interrupt in 16.
        """


class Tried(NamedTuple):
    """What came of an interrupt."""

    number: int  # of the line, in the order in which they ran
    where: str
    problem: str  # empty: none


def visits(part: Part, every_visit: bool = False) -> list[int]:
    """The numbers of the lines to try: the first and the last visit of each line, or every one."""
    part.prepare()
    with (lines := Lines(files=part.files)).running():
        part.act()
    part.check()
    if every_visit:
        return list(range(len(lines.seen)))
    first = {line: i for i, line in reversed(list(enumerate(lines.seen)))}
    last = {line: i for i, line in enumerate(lines.seen)}
    return sorted({*first.values(), *last.values()})


def attempts(part: Part, numbers: Sequence[int]) -> Iterator[Tried]:
    """Interrupts a part before each of these lines."""
    if part.forks:
        yield from _forked(part, numbers)
        return
    for at in numbers:
        part.prepare()
        lines = Lines(at, part.files)
        problem = _problem(part, lines)
        if lines.where is not None:  # else there were fewer lines than the first time
            yield Tried(at, str(lines.where), problem)


def _forked(part: Part, numbers: Sequence[int]) -> list[Tried]:
    here, lines = os.getpid(), _Forks(numbers, part.files)
    part.prepare()
    try:
        problem = _problem(part, lines)
        if lines.child is not None:
            os.write(lines.child, problem.encode())
            os._exit(0)
    finally:
        if os.getpid() != here:
            os._exit(1)
    return lines.results


def _problem(part: Part, lines: Lines) -> str:
    """Runs a part, and says what is wrong afterwards."""
    problem = ""
    try:
        with lines.running():
            part.act()
        problem = "" if lines.where is None else "Ctrl-C was lost"
    except KeyboardInterrupt:
        pass
    except Exception as error:
        problem = f"Ctrl-C became {type(error).__name__}: {error}"
    try:
        part.check(len(lines.seen) % 16 == 0)
    except Exception as error:  # whatever a step that is no longer right ends in
        problem = "; ".join(filter(None, [problem, f"{type(error).__name__}: {error}".partition("\n")[0]]))
    return problem
