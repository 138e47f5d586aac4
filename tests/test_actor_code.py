"""Ray keeps the code of an actor's class; what it starts later shall be of the later release."""

import inspect
import io
import pickletools
from typing import Any

import pytest
from ray import cloudpickle

from silvershard.cluster.sequencer_actor import SequencerActor, SequencerProcess
from silvershard.cluster.shard_actor import ShardActor, ShardProcess
from silvershard.cluster.table_actor import TableActor, TableProcess
from silvershard.deploy.host_actor import HostActor, HostProcess
from silvershard.deploy.supervisor_actor import SupervisorActor, SupervisorProcess


@pytest.mark.parametrize(
    ("actor", "process"),
    [
        (ShardActor, ShardProcess),
        (SequencerActor, SequencerProcess),
        (TableActor, TableProcess),
        (HostActor, HostProcess),
        (SupervisorActor, SupervisorProcess),
    ],
)
def test_an_actor_is_nothing_but_a_process_that_is_looked_up(actor: Any, process: type) -> None:
    made = actor.__ray_metadata__.modified_class
    base = next(one for one in made.__mro__ if one.__module__ == process.__module__)
    functions = [inspect.unwrap(one) for one in vars(base).values() if inspect.isfunction(one)]
    methods = [one for one in functions if one.__module__ == process.__module__]
    assert methods
    used = {name for one in methods for name in inspect.getclosurevars(one).globals}
    assert used <= {process.__name__}
    public = {name for name in vars(process) if not name.startswith("_")}
    assert public == {name for name in vars(base) if not name.startswith("_")}
    # The process itself is there by its name alone.
    strings = [
        found
        for _, found, _ in pickletools.genops(io.BytesIO(cloudpickle.dumps(made)))
        if isinstance(found, str)
    ]
    assert process.__name__ in strings
    assert not [one for one in strings if one in vars(process) and one not in vars(base)]
