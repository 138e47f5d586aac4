from types import SimpleNamespace

import pytest

from silvershard.cluster.stage_gate import Abandoned, StageGate
from silvershard.shard.errors import DeadlineExceeded


def test_a_call_runs_while_somebody_waits_for_it_in_time_and_the_rest_is_counted() -> None:
    now_s = 10.0
    gate = StageGate(lambda: now_s)
    call = SimpleNamespace(dropped=False, expires_at_s=11.0)
    gate.check(call, "open")
    now_s = 11.0
    with pytest.raises(DeadlineExceeded, match="ran out in the queue before rerank"):
        gate.check(call, "rerank")
    call.dropped = True
    for _ in range(2):
        with pytest.raises(Abandoned):
            gate.check(call, "value")
    assert gate.expired == {"rerank": 1}
    assert gate.cancelled == {"value": 2}
