"""When what runs in the nested host is run once more."""

from __future__ import annotations

import pytest

from tests.framework.nested_host import Completed, NestedHost


class Scripted(NestedHost):
    """A host that answers from a list."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        super().__init__()
        self._answers = list(answers)

    def run(self, *_: object, **__: object) -> Completed:
        status, stdout = self._answers.pop(0)
        return Completed(status=status, timed_out=False, stdout=stdout, stderr=b"", took_s=0.0)


def test_a_processor_that_shut_down_gets_a_second_run_and_a_warning() -> None:
    for shown in (b"  left: Shutdown\n", b"processor 1 shut down (triple fault)"):
        for second in (0, 1):
            with pytest.warns(UserWarning, match="failed once in the nested host"):
                done = Scripted((1, shown), (second, b"")).run_twice(["x"])
            assert done.status == second


def test_any_other_failure_counts_at_once() -> None:
    assert Scripted((1, b"left: [1]"), (0, b"")).run_twice(["x"]).status == 1
    assert Scripted((0, b"left: Shutdown"), (1, b"")).run_twice(["x"]).status == 0
