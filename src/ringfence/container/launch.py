"""Starting ``ringfence-init`` with a plan, and answering what it asks."""

from __future__ import annotations

import os

from ringfence.container import init_program, lean_json
from ringfence.container.fields import Fields
from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Plan = dict[str, object]

__all__ = ["Launch"]

# The question that the first stage asks.
_BEFORE_FORK = "map"


class Launch:
    """One start of the setup program, which then waits for its plan.

    Args:
        inherit: Descriptors that the plan will name by number.
        streams: Descriptors for standard input, output and error; None: the caller's own.
        early: Namespaces (``CLONE_NEW*``) that it makes while the plan is still being written.
    """

    __slots__ = ("_answers", "_buffer", "_plan", "_status", "argument", "pid", "stage")

    def __init__(
        self, inherit: Iterable[int] = (), streams: Sequence[int] | None = None, early: int = 0
    ) -> None:
        self.pid = 0
        # What the question that is being answered is about, where it says so.
        self.argument = ""
        self._buffer = b""
        status, status_end = os.pipe2(os.O_CLOEXEC)
        answers_end, answers = os.pipe2(os.O_CLOEXEC)
        plan_end, plan_in = os.pipe2(os.O_CLOEXEC)
        self._status, self._answers, self._plan = status, answers, plan_in
        program = init_program.sealed_copy(init_program.find())
        ours = [status_end, answers_end, plan_end]
        try:
            numbers = [*ours, *inherit]
            actions: list[tuple[int, int, int]] = [
                (os.POSIX_SPAWN_DUP2, number, place) for place, number in enumerate(streams or ())
            ]
            # A descriptor onto itself: it stays open in this child, and in no other.
            actions += [(os.POSIX_SPAWN_DUP2, number, number) for number in numbers]
            arguments = [init_program.NAME, str(plan_end), str(status_end), str(answers_end)]
            if early:
                arguments.append(str(early))
            self.stage = os.posix_spawn(
                f"/proc/self/fd/{program}",
                arguments,
                {},
                file_actions=actions,
                setsigmask=(),
            )
        except OSError as error:
            self.close()
            message = f"cannot start {init_program.NAME}: {error.strerror}"
            raise HostError(message, errno=error.errno) from error
        finally:
            for number in ours:
                os.close(number)

    def give(self, plan: Plan) -> None:
        """Says what it is to do."""
        left = memoryview(lean_json.dumps(plan).encode())
        try:
            while left:
                left = left[os.write(self._plan, left) :]
        except BrokenPipeError:
            return  # it ended; its last message says why
        finally:
            os.close(self._plan)
            self._plan = -1

    def follow(self, answers: Mapping[str, Callable[[], str]], *, until: str = "") -> None:
        """Answers questions until the program runs.

        Args:
            answers: What to do for each question; what it returns is the answer.
            until: Return earlier: when its number is known (``pid``), or where it waits to be
                started (``ready``).

        Raises:
            HostError: The setup failed; the message names the step.
        """
        early: list[str] = []
        for line in self._lines():
            message = Fields(lean_json.loads(line, "the setup's message"))
            if "pid" in message:
                self.pid = message.integer("pid")
                os.waitpid(self.stage, 0)
                self.stage = 0
                for question in early:
                    self._answer(answers, question)
                early.clear()
                if until == "pid":
                    return
            elif "ask" in message:
                question = message.text("ask")
                # The second stage may speak before the first has said its number.
                if self.pid or question == _BEFORE_FORK:
                    self._answer(answers, question)
                else:
                    early.append(question)
            elif "error" in message:
                self._failed(message.table("error"))
            elif "ready" in message and until == "ready":
                return

    def _lines(self) -> Iterable[bytes]:
        while True:
            line, found, rest = self._buffer.partition(b"\n")
            if found:
                self._buffer = rest
                yield line
                continue
            chunk = os.read(self._status, 65536)
            if not chunk:
                return
            self._buffer += chunk

    def _answer(self, answers: Mapping[str, Callable[[], str]], question: str) -> None:
        kind, _, self.argument = question.partition(" ")
        text = answers[kind]() if kind in answers else ""
        try:
            os.write(self._answers, text.replace("\n", " ").encode() + b"\n")
        except BrokenPipeError:
            return

    def _failed(self, error: Fields) -> None:
        self.reap()
        raise HostError(error.text("message"), errno=error.optional_integer("errno"))

    def reap(self) -> None:
        """Collects the processes of a start that failed."""
        for pid in (self.pid, self.stage):
            try:
                if pid:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
            except (ChildProcessError, ProcessLookupError):
                continue

    def close(self) -> None:
        """Lets go of the pipes. The program goes on."""
        for name in ("_status", "_answers", "_plan"):
            number: int = getattr(self, name)
            if number >= 0:
                os.close(number)
                setattr(self, name, -1)
