"""The engine's end: it loads a model, and steps an engine for the process at the other end."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...engine.outputs import News
from ..loading import load_weights, make_engine
from .messages import (
    Accepted,
    Ask,
    Cancel,
    Done,
    FromEngine,
    FromServer,
    Load,
    Loading,
    NotLoaded,
    Ready,
    Refused,
    Step,
    Submit,
    encode,
    receive,
)

if TYPE_CHECKING:
    from ...engine.engine import Engine
    from ...engine.loop import EngineLoop


class EngineServer:
    """Runs an engine for the process at the other end of a connection.

    Args:
        connection: To that process. Sending blocks while that process does not read, which bounds what waits.
        when_gone: Called in a thread of its own once the other end is closed.
    """

    def __init__(self, connection: socket.socket, when_gone: Callable[[], None]) -> None:
        self._connection, self._when_gone = connection, when_gone
        self._loop: EngineLoop | None = None

    def load(self) -> tuple[Engine, dict[str, Any]] | None:
        """Load what the other process asks for. Return `None` if that failed; the other process knows the reason."""
        message = receive(self._connection)
        if not isinstance(message, Load):
            return None
        threading.Thread(target=self.listen, name="requests", daemon=True).start()
        try:
            return make_engine(message.settings, lambda stage: self._send(Loading(stage)))
        except Exception as error:
            if not isinstance(error, (OSError, ValueError)):
                traceback.print_exc()
            self._send(NotLoaded(error))
            return None

    def run(self, engine: Engine, sampling_defaults: dict[str, Any]) -> None:
        """Step the engine until its GPU fails.

        Args:
            engine: The engine.
            sampling_defaults: See `Ready`.
        """
        from ...engine.loop import EngineLoop

        self._loop = EngineLoop(engine, self._deliver, load_weights)
        self._send(Ready(_description(engine), engine.max_sequence_length, sampling_defaults, engine.stats()))
        # Now, since hardly any request has come, and it would delay those that run later.
        threading.Thread(target=engine.grammars.prepare, name="grammars", daemon=True).start()
        self._loop.run()

    def listen(self) -> None:
        """Pass the other process's requests on, until that closes the connection."""
        while (message := receive(self._connection)) is not None:
            assert self._loop is not None, "requests come after Ready"
            self._take(self._loop, message)
        self._when_gone()

    def _take(self, loop: EngineLoop, message: FromServer) -> None:
        match message:
            case Submit():
                is_prepared = loop.prepare(message.params)
                is_prepared.add_done_callback(lambda _: loop.command(lambda: self._submit(loop, message)))
            case Cancel():
                loop.command(lambda: loop.cancel(message.request_id))
            case Ask():
                loop.command(
                    lambda: loop.control(
                        message.control, lambda state, error: self._send(Done(message.number, state, error))
                    )
                )
            case _:
                raise AssertionError(message)

    def _submit(self, loop: EngineLoop, message: Submit) -> None:
        try:
            request_id = loop.submit(message.tokens, message.params, message.arrival)
        except Exception as error:
            self._send(Refused(message.number, error))
        else:
            self._send(Accepted(message.number, request_id))

    def _deliver(self, news: News) -> None:
        assert self._loop is not None
        news.stats = self._loop.engine.stats()
        self._send(Step(news))

    def _send(self, message: FromEngine) -> None:
        with suppress(ConnectionError):  # `listen` sees that the other end is closed
            self._connection.sendall(encode(message))


def _description(engine: Engine) -> str:
    """Return the sizes and the memory of an engine."""
    from ...engine.limits import weight_bytes

    pool = engine.scheduler.blocks.pool
    cache = engine.cache_bytes
    kind = "" if engine.kv_cache_dtype == "auto" else f", {engine.kv_cache_dtype}"
    everything = weight_bytes(engine.model)
    weights = everything - cache if engine.model.device.type == "cuda" else everything
    rows, length, device = engine.scheduler.max_rows, engine.max_sequence_length, engine.model.device
    return (
        f"{rows} sequences of up to {length:,} tokens on {device}; weights {weights / 2**30:.2f} GiB, "
        f"cache {cache / 2**30:.2f} GiB ({pool.total_num_pages:,} pages of {pool.page_size} tokens{kind})"
    )
