"""One of the processes of a training; ``distributed.py`` starts it and hears what it says."""

import argparse
import functools
import logging
import pickle
import signal
import sys
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from silvershard.deploy.distributed import JOB, MEETING, Event, Job, Kind
from silvershard.deploy.processes import die_with_parent
from silvershard.model.distributed import DistributedStep, joined
from silvershard.model.training import Watch, assist, train

_LOST = ("gloo", "NCCL", "Connection", "connection", "imed out", "imeout")


def main(argv: Sequence[str] | None = None) -> int:
    """Take part in a training; return the exit code."""
    parser = argparse.ArgumentParser(prog="silvershard.deploy.distributed_process")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    # Whoever started this process ends it: a key that is pressed there must not end it before.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(options.parent, signal.SIGKILL)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    job: Job = pickle.loads((options.folder / JOB).read_bytes())
    events = Connection(options.events, readable=False)
    return run(job, options.rank, options.folder / MEETING, events)


def run(job: Job, rank: int, meeting: Path, events: Connection) -> int:
    """Train with the other processes, saying through ``events`` what comes of it.

    Args:
        job: what is trained.
        rank: of this process, in [0, processes).
        meeting: a file that does not exist, through which the processes find each other.
        events: takes pickled events.
    """

    def say(kind: Kind, content: object) -> None:
        events.send_bytes(pickle.dumps(Event(kind, content)))

    config = job.arguments["config"]
    try:
        found = torch.cuda.device_count() if config.device == "cuda" else config.processes
        if found < config.processes:
            raise ValueError(
                f"training.device cuda needs {config.processes} GPUs, one for each of "
                f"training.processes, got {found}"
            )
        with joined(
            meeting,
            rank,
            config.processes,
            device=config.device,
            timeout_s=config.process_timeout_s,
        ) as peers:
            try:
                arguments = {
                    **job.arguments,
                    "start": functools.partial(DistributedStep, peers=peers),
                }
                if rank:
                    assist(**arguments)
                    return 0
                watch = Watch(
                    on_log=functools.partial(say, "log"),
                    on_checkpoint=functools.partial(say, "checkpoint"),
                    checkpoint_every=arguments.pop("checkpoint_every"),
                    progress=job.progress,
                )
                say("trained", train(**arguments, watch=watch))
                return 0
            except ValueError as error:
                # Said before this process leaves the others, which fail then.
                say("refused", str(error))
    except ValueError as error:
        say("refused", str(error))
    except Exception as error:  # noqa: BLE001 - what went wrong is told to the parent
        lost = isinstance(error, RuntimeError) and any(one in str(error) for one in _LOST)
        first = str(error).splitlines()[0] if str(error) else ""
        say("deserted" if lost else "failed", f"{type(error).__name__}: {first}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
