"""The connection of a client to one table shard: multiplexed calls, beats, fencing by epoch."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from silvershard.cluster import table_pb2, table_pb2_grpc
from silvershard.cluster.codec import code_name
from silvershard.cluster.config import PingSection
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.stream_link import Connection, StreamLink
from silvershard.cluster.table_map import TableEntry

UNAVAILABLE = "UNAVAILABLE"

_BEAT_LIVES_S = 60.0


@dataclass(frozen=True)
class Refused:
    """Why a call has no answer."""

    code: str
    """Name of a gRPC status."""
    message: str


Outcome = table_pb2.TableReply | Refused
Done = Callable[[Outcome], None]


@dataclass(eq=False)
class _Waiting:
    done: Done | None


_TableConnection = Connection[table_pb2.TableCall, _Waiting]


class TableLink(StreamLink[table_pb2.TableCall, table_pb2.TableReply, _Waiting]):
    """One incarnation of one table shard; everything here runs on one event loop."""

    def __init__(
        self,
        entry: TableEntry,
        ping: PingSection,
        dialer: Dialer = PLAIN,
    ) -> None:
        """Make a link that does not connect yet; ``start`` does.

        Args:
            entry: what to connect to.
            ping: times between beats, and how many may go unanswered.
            dialer: opens channels.
        """
        super().__init__(entry.address, f"table shard {entry.shard}", ping, dialer)
        self.entry = entry
        self._beat = 0
        """The call of the last beat."""

    def send(self, call: table_pb2.TableCall, remaining_s: float, done: Done | None) -> int:
        """Send a call; ``done`` hears of its end, at once if there is nobody to ask.

        Args:
            call: its operation; the rest is filled in.
            remaining_s: time after which the shard need not begin.
            done: must not block; None: nobody waits.

        Returns:
            The number of the call, for ``forget``.
        """
        call.call_id = next(self._ids)
        connection = self._connection
        if connection is None or self.hung:
            if done is not None:
                done(Refused(UNAVAILABLE, f"no answer from {self.entry.address}"))
            return call.call_id
        self._address_call(connection, call, remaining_s, done)
        return call.call_id

    def forget(self, call_id: int) -> None:
        """Drop a call for which nobody waits any more; its answer is still a sign of life."""
        waiting = self._connection.pending.get(call_id) if self._connection is not None else None
        if waiting is not None:
            waiting.done = None

    def _address_call(
        self,
        connection: _TableConnection,
        call: table_pb2.TableCall,
        remaining_s: float,
        done: Done | None,
    ) -> None:
        call.epoch = self.entry.epoch
        call.remaining_us = max(0, int(remaining_s * 1e6))
        self._post(connection, call, _Waiting(done))

    def _open(self, channel: grpc.aio.Channel) -> Any:
        return table_pb2_grpc.TableStub(channel).Execute()

    def _receive(self, connection: _TableConnection, reply: table_pb2.TableReply) -> None:
        waiting = connection.pending.pop(reply.call_id, None)
        if waiting is None:
            return
        outcome: Outcome = reply
        if reply.epoch != self.entry.epoch:
            outcome = Refused(
                UNAVAILABLE, f"answered as epoch {reply.epoch}, {self.entry.epoch} was asked"
            )
        else:
            # Another incarnation on the same address is not a sign of life of this one.
            self._heard, self._misses = True, 0
            if reply.code:
                outcome = Refused(code_name(reply.code), reply.message)
        if waiting.done is not None:
            waiting.done(outcome)

    def _fail(self, waiting: _Waiting, message: str) -> None:
        if waiting.done is not None:
            waiting.done(Refused(UNAVAILABLE, message))

    async def _watch(self) -> None:
        """Ask for no rows every now and then: the answer tells that the shard lives."""
        every_s = self._ping.every_ms / 1e3
        while True:
            connection = self._connection
            # Beats must not pile up before a shard that hangs.
            if connection is not None and self._beat not in connection.pending:
                self._beat = next(self._ids)
                beat = table_pb2.TableCall(call_id=self._beat, take=table_pb2.Take())
                self._address_call(connection, beat, _BEAT_LIVES_S, None)
            await asyncio.sleep(every_s)
            self._count_look()
