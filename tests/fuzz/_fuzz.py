"""What is fuzzed: a check of one case, and how cases are drawn. A few of them run as a test, as many as wanted by `python -m tests.fuzz`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# Under load an example takes long, and the first one compiles, imports and converts.
_PATIENT: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


class Target(NamedTuple):
    """One kind of cases."""

    check: Callable[[Any], None]
    cases: st.SearchStrategy[Any]


TARGETS: dict[str, Target] = {}  # by "file.name", of all files that have been imported


def fuzz(
    cases: st.SearchStrategy[Any], examples: int, *found: Any
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Makes a test of a check: the same `examples` cases in every run, and those that were `found` wrong once."""

    def decorate(check: Callable[[Any], None]) -> Callable[[], None]:
        name = check.__module__.rpartition("test_fuzz_")[2] + "." + check.__name__.removeprefix("test_")
        TARGETS[name] = Target(check, cases)
        test: Any = given(case=cases)(check)
        for case in found:
            test = example(case=case)(test)
        return settings(max_examples=examples, derandomize=True, database=None, **_PATIENT)(test)

    return decorate


def run(target: Target, examples: int, database: Any) -> int:
    """Checks new cases at random, and those that failed in an earlier run; returns how many. Raises what a check raises."""
    count = 0

    @functools.wraps(target.check)
    def counted(case: Any) -> None:
        nonlocal count
        count += 1
        target.check(case)

    test: Any = given(case=target.cases)(counted)
    settings(max_examples=examples, database=database, derandomize=False, **_PATIENT)(test)()
    return count
