"""Every call that a router has on its way to a shard, as the network sees it."""

from typing import Any

from simulation.checks import LOSERS_END, NO_UNKNOWN_FAILURE, NOTHING_LEFT, ONE_HEDGE

from silvershard.cluster import tensors

_SOON_S = 0.001
_INTERNAL = 13


class CallLedger:
    """Checks that no more than two replicas are asked at a time, and that nobody is forgotten."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self._active: dict[tuple[str, str], dict[tuple[Any, int], float]] = {}
        """Of each client and batch: stream and number of a call, and when its time is over."""
        world.network.on_call = self._sent
        world.network.on_reply = self._received
        world.network.on_end = self._ended
        self._keys: dict[Any, dict[int, tuple[str, str]]] = {}

    def _sent(self, call: Any, message: Any) -> None:
        if not call.method.endswith("Execute"):
            return
        op, now_s = message.WhichOneof("op"), self._world.loop.now_s
        client = call.path.client.name
        for released in message.released:
            key = client, released
            going = [one for one in self._living(key) if one[0] is call]
            if going:
                self._world.loop.call_later(_SOON_S, self._check_released, key, going)
        if op == "cancel":
            self._forget(call, message.cancel)
        elif message.key:
            key = client, message.key
            active = self._active.setdefault(key, {})
            active[call, message.call_id] = now_s + message.remaining_us / 1e6
            self._keys.setdefault(call, {})[message.call_id] = key
            self._check_hedges(key, call.process.place.shard)

    def _received(self, call: Any, message: Any) -> None:
        if not call.method.endswith("Execute"):
            return
        self._forget(call, message.call_id)
        if message.code == _INTERNAL:
            self._world.checks.violated(NO_UNKNOWN_FAILURE, message.message)
        if "tasks" in message.tensors.layout:
            tasks = tensors.from_map(message.tensors, tensors.ROUND_TWO)["tasks"]
            if tasks.numel():
                origin = self._world.origins[int(tasks.flatten()[0])]
                origin.received_s = min(origin.received_s, self._world.loop.now_s)

    def _ended(self, call: Any) -> None:
        for call_id in list(self._keys.get(call, ())):
            self._forget(call, call_id)
        self._keys.pop(call, None)

    def _forget(self, call: Any, call_id: int) -> None:
        key = self._keys.get(call, {}).pop(call_id, None)
        if key is not None:
            self._active[key].pop((call, call_id), None)
            if not self._active[key]:
                del self._active[key]

    def _living(self, key: tuple[str, str]) -> list[Any]:
        now_s = self._world.loop.now_s
        return [
            (call, call_id)
            for (call, call_id), until_s in self._active.get(key, {}).items()
            if until_s > now_s
        ]

    def _check_hedges(self, key: tuple[str, str], shard: int) -> None:
        living = [call for call, _ in self._living(key) if call.process.place.shard == shard]
        asked = {call.path.address for call in living}
        if len(asked) > 2:
            self._world.checks.violated(ONE_HEDGE, f"{sorted(asked)} are asked for {key}")

    def _check_released(self, key: tuple[str, str], before: list[Any]) -> None:
        """Check that calls have ended whose candidates were released."""
        for call, call_id in self._living(key):
            if (call, call_id) in before:
                self._world.checks.violated(
                    LOSERS_END, f"call {call_id} of {key} goes on at {call.path.address}"
                )

    def check_empty(self) -> None:
        """Check that no call is left."""
        for key in self._active:
            for call, call_id in self._living(key):
                self._world.checks.violated(
                    NOTHING_LEFT, f"call {call_id} of {key} at {call.path.address}"
                )
