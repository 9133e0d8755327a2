"""A response that is generated in one place and read in another, piece by piece."""

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
    """Yields the pieces of a response as they are generated. Closing the iterator cancels the work.

    Args:
        model: Name of the model, for errors.
        chat: Generates the response, and calls its argument with each piece, from any thread.
        on_complete: Called with the result after the last piece.

    Raises:
        BackendError: If the response fails.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def emit(piece: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    work = asyncio.create_task(chat(emit))
    # After all pieces, which are put into the queue in the same way.
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
