"""The asyncio twins: the same names, tasks that go on, and cancelling."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING

import pytest

from ringfence import aio
from ringfence.errors import CommandError
from ringfence.machine import machine as sync_machine
from ringfence.machine import process as sync_process
from ringfence.machine import sandbox as sync_sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.framework.fake_driver import FakeDriver


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("twin", "original", "left_out"),
    [
        (
            aio.Machine,
            sync_machine.Machine,
            {"command", "engine_reason", "entry", "keeps_changes", "make_workdir", "spec"},
        ),
        (aio.Sandbox, sync_sandbox.Sandbox, {"command_for"}),
        (aio.Process, sync_process.Process, {"argv", "poll", "stdin", "stdout", "stderr"}),
    ],
)
def test_the_names_are_the_same(twin: type, original: type, left_out: set[str]) -> None:
    machine_only = {"command", "engine_reason", "entry", "keeps_changes", "make_workdir", "spec"}
    assert public(original) - left_out - machine_only <= public(twin)


@pytest.mark.usefixtures("driver")
def test_commands_run_at_once() -> None:
    async def main() -> list[str]:
        async with aio.Machine(engine="bt") as machine:
            runs = (machine.run(["sh", "-c", f"sleep 0.2; echo {n}"]) for n in range(10))
            return [result.stdout for result in await asyncio.gather(*runs)]

    begin = time.monotonic()
    assert asyncio.run(main()) == [f"{n}\n" for n in range(10)]
    assert time.monotonic() - begin < 1.5


@pytest.mark.usefixtures("driver")
def test_streams_and_errors() -> None:
    async def main() -> None:
        async with aio.Sandbox(engine="bt") as box:
            assert (await box.run_code("print(1)")).stdout == "1\n"
            with pytest.raises(CommandError):
                await box.run(["false"], check=True)
            async with await box.popen(["cat"]) as process:
                await process.write(b"hello")
                assert await process.read() == b"hello"
                await process.close_stdin()
                assert await process.wait() == 0
            await box.files.write("/f", b"x")
            assert await box.files.read("/f") == b"x"

    asyncio.run(main())


def cancelled_after(seconds: float, driver: FakeDriver, *, wait: Callable[[], bool]) -> None:
    async def main() -> None:
        async with aio.Machine(engine="bt") as machine:
            task = asyncio.create_task(machine.run(["sleep", "60"]))
            while not wait():  # noqa: ASYNC110 - the driver knows no events
                await asyncio.sleep(0.01)
            await asyncio.sleep(seconds)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await machine.run(["echo", "still here"])).stdout == "still here\n"

    begin = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - begin < 10
    assert driver.started[0].closed


def test_a_cancelled_command_is_ended(driver: FakeDriver) -> None:
    def begun() -> bool:
        return bool(driver.started and driver.started[0].agent.commands)

    cancelled_after(0.05, driver, wait=begun)
