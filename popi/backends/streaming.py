"""An answer that is written in one place and read in another, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from popi.backends.base import ChatResult, OnComplete
from popi.errors import BackendError

Emit = Callable[[str], None]


async def streamed(
    model: str, chat: Callable[[Emit], Coroutine[Any, Any, ChatResult]], on_complete: OnComplete
) -> AsyncIterator[str]:
    """Gives the pieces of an answer as they come; when it is left, the work is cancelled.

    Args:
        model: The model's name, for errors.
        chat: Answers, and hands each piece to what it is given, from whatever thread.
        on_complete: Told the answer.

    Raises:
        BackendError: If the answer cannot be had or breaks off.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def emit(piece: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    work = asyncio.create_task(chat(emit))
    # Behind all that was emitted, which takes the same way.
    work.add_done_callback(lambda _: loop.call_soon(pieces.put_nowait, None))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        result = await work
    finally:
        work.cancel()
    if result.error is not None:
        raise BackendError(f"{model}: {result.error}", failure=result.failure)
    on_complete(result)
