"""Stop requests: what is waited for is given up, and says so."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from megatron_fapo.training.signals import EXIT_INTERRUPTED, EXIT_SAVED, StopRequest, StopRequestedError


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_SAVED), (signal.SIGUSR1, EXIT_SAVED), (signal.SIGINT, EXIT_INTERRUPTED)],
)
def test_a_signal_gives_up_what_is_waited_for(number: signal.Signals, code: int) -> None:
    cleaned = []

    async def rollout() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0)  # what is cancelled has the time to clean up
            cleaned.append(True)

    async def main() -> int:
        with StopRequest() as stop:
            with pytest.raises(StopRequestedError):
                await stop.race(rollout())
            assert cleaned == [True]
            with pytest.raises(StopRequestedError):
                stop.check()
            return stop.exit_code

    assert asyncio.run(main()) == code


def test_without_a_signal_nothing_is_in_the_way() -> None:
    async def main() -> int:
        with StopRequest() as stop:
            stop.check()
            return await stop.race(asyncio.sleep(0, result=7))

    assert asyncio.run(main()) == 7


def test_an_error_of_the_work_is_its_own() -> None:
    async def main() -> None:
        async def fails() -> None:
            raise KeyError("mine")

        with StopRequest() as stop:
            await stop.race(fails())

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(main())


def test_a_second_interrupt_ends_at_once() -> None:
    async def main() -> None:
        with StopRequest():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
