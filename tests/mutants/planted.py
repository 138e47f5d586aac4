"""Bugs as people make them, each a small change of the source, and who must notice it.

They are applied to a copy of the tree only.
"""

from dataclasses import dataclass

HISTORY = "tests/history/test_live_cluster.py"
"""The checker of histories, over what a small cluster did."""

SIMULATION = "tests/simulation/run.py"
"""The properties of a cluster in virtual time."""


@dataclass(frozen=True)
class Edit:
    """A text of a file that stands there once, and what stands there instead."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class Mutant:
    """A planted bug."""

    name: str
    edits: tuple[Edit, ...]
    caught_by: str
    """A test, ``HISTORY``, or a seed of the simulation."""

    @property
    def is_watched(self) -> bool:
        """Return whether it violates a property, and not the expectation of one test."""
        return self.caught_by == HISTORY or self.caught_by.startswith(SIMULATION)


def simulation(seed: int, requests: int) -> str:
    """Return a run of the simulation as ``caught_by`` has it."""
    return f"{SIMULATION} --seed {seed} --requests {requests}"


def bug(name: str, path: str, before: str, after: str, caught_by: str) -> Mutant:
    """Return a planted bug of one edit."""
    return Mutant(name, (Edit(path, before, after),), caught_by)


MUTANTS: tuple[Mutant, ...] = (
    # Router.
    bug(
        "cutoffs are made with the candidates of a shard that is lost",
        "cluster/rounds.py",
        "            rounds = [self._opened[shard].value for shard in self._fanout.alive]\n",
        "            rounds = [one.value for one in self._opened.values()]\n",
        "tests/cluster/test_rounds.py"
        "::test_the_cutoffs_are_computed_again_without_a_shard_lost_in_round_two",
    ),
    bug(
        "coverage is weighed by shards instead of documents",
        "cluster/fanout.py",
        "        return answered / addressed if addressed else 1.0\n",
        "        return len(shards) / len(self.documents) if addressed else 1.0\n",
        HISTORY,
    ),
    bug(
        "an answer that lacks a shard says that it has looked everywhere",
        "cluster/rounds.py",
        "            whole = coverage.shards_failed == 0\n",
        "            whole = coverage.shards_full > 0\n",
        HISTORY,
    ),
    bug(
        "an answer below its minimum is given all the same",
        "cluster/rounds.py",
        "    if coverage.shards_full and coverage.documents >= minimum:\n",
        "    if coverage.shards_full:\n",
        "tests/cluster/test_rounds.py::test_the_minimum_is_a_share_of_the_documents",
    ),
    bug(
        "candidates are not released",
        "cluster/rounds.py",
        "                link.release(self._batch.key)\n",
        "                del link\n",
        "tests/cluster/test_rounds.py::test_shards_may_be_lost_one_after_the_other",
    ),
    bug(
        "the cut of an answer is that of its fastest shard",
        "cluster/freshness.py",
        "    cut = [min(positions) for positions in zip(",
        "    cut = [max(positions) for positions in zip(",
        HISTORY,
    ),
    bug(
        "a token is met by the position before it",
        "cluster/freshness.py",
        "seen.cut[token.partition] < token.position:",
        "seen.cut[token.partition] < token.position - 1:",
        "tests/cluster/test_freshness.py::test_a_demand_is_met_by_every_position_and_the_staleness",
    ),
    bug(
        "a replica that is behind answers who demands more",
        "cluster/hosting.py",
        "        if self._is_met(hosted, consistency, arrived_s):\n"
        "            return\n"
        "        until_s",
        "        if hosted.serves:\n            return\n        until_s",
        HISTORY,
    ),
    # Merge.
    bug(
        "ties at the cut go to the larger id",
        "model/merge.py",
        "((scores == cut_scores) & (item_ids <= cut_ids))",
        "((scores == cut_scores) & (item_ids >= cut_ids))",
        "tests/model/test_merge.py::test_ties_at_the_cutoff_go_to_the_smaller_id",
    ),
    bug(
        "the lists of the heads are united with their duplicates",
        "model/retriever.py",
        "    ordered = ordered.masked_fill(repeated | (ordered != later), -1)\n",
        "    ordered = ordered.masked_fill(ordered != later, -1)\n",
        "tests/model/test_retriever.py::test_heads_are_united_or_intersected_without_duplicates",
    ),
    bug(
        "a result has the payload of another shard",
        "model/merge.py",
        "            flat = _stack(lists, fill).permute(1, 2, 0, 3)",
        "            flat = _stack(lists[::-1], fill).permute(1, 2, 0, 3)",
        "tests/model/test_merge.py::test_results_keep_their_own_payload_and_padding_stays_padding",
    ),
    # Shard.
    bug(
        "the absence of a Bloom term is concluded from its planes",
        "model/filter.py",
        "    if isinstance(expr, Not) and _is_bloom_term(expr.operand, dictionary):\n"
        "        return AnyItem()\n",
        "    if isinstance(expr, Not) and _is_bloom_term(expr.operand, dictionary):\n"
        "        return expr\n",
        "tests/model/test_filter.py::test_random_filters_pass_exactly_the_items_of_the_python_sets",
    ),
    bug(
        "what passes the planes is not verified",
        "model/filter.py",
        "    return CompiledFilter(scan, _program(exact, dictionary, lists), True)\n",
        "    return CompiledFilter(scan, _tensor([]), True)\n",
        "tests/model/test_filter.py::test_random_filters_pass_exactly_the_items_of_the_python_sets",
    ),
    bug(
        "a shard answers in the generation that it has for the one that was asked",
        "cluster/hosting.py",
        "        if found is not None and found.serves:\n            return found\n",
        "        if found is not None and found.serves:\n            return found\n"
        "        if self.served:\n            return self.served[-1]\n",
        "tests/cluster/test_hosting.py::test_a_generation_is_let_go_of_and_its_follower_ends",
    ),
    bug(
        "a generation serves before it has caught up",
        "cluster/hosting.py",
        "                hosted.follower.catch_up()\n",
        "                pass\n",
        "tests/cluster/test_hosting.py"
        "::test_a_generation_is_loaded_catches_up_and_only_then_serves",
    ),
    bug(
        "the cut is moved before its updates are committed",
        "cluster/hosting.py",
        "        committed: Future[Rejected] = self._run_on_model(",
        "        executor.cut = executor.cut if cut is None else cut\n"
        "        committed: Future[Rejected] = self._run_on_model(",
        "tests/cluster/test_hosting.py::test_what_serves_is_changed_on_the_thread_of_the_model",
    ),
    bug(
        "the slot of a deleted item stays live",
        "shard/live_index.py",
        "        self._rows.show(taken, old_slots[old_slots >= 0])\n",
        "        self._rows.show(taken, old_slots[(old_slots >= 0) & (slots[kept] >= 0)])\n",
        HISTORY,
    ),
    bug(
        "an older update that comes late wins",
        "shard/live_index.py",
        "        fresh = versions > known.versions\n",
        "        fresh = versions != known.versions\n",
        "tests/shard/test_live_index.py::test_the_last_version_wins_in_whatever_order_changes_come",
    ),
    bug(
        "a delete is followed by the older upsert of its batch",
        "shard/coalesce.py",
        "        if last is not None and mutation.version <= last.version:\n",
        "        if last is not None and mutation.version == last.version:\n",
        "tests/shard/test_coalesce.py::test_an_older_version_that_comes_again_is_ignored",
    ),
    bug(
        "slots are taken again that an open query reads",
        "shard/executor.py",
        "            part.reclaim(min((epochs[at] for epochs in opened), default=part.epoch))\n",
        "            part.reclaim(part.epoch)\n",
        "tests/shard/test_executor.py::test_slots_are_reused_as_soon_as_no_query_reads_them",
    ),
    bug(
        "fields are those of now and not those of the query",
        "shard/executor.py",
        "        query = None if key is None else self._open.get(key)\n",
        "        query = None\n",
        "tests/shard/test_executor.py::test_an_open_query_reads_the_fields_that_its_items_had",
    ),
    bug(
        "the cut moves with the first half of a batch",
        "cluster/follower.py",
        "            self._apply_all(mutations[:middle], None if cut is None else self._lag.cut)\n",
        "            self._apply_all(mutations[:middle], cut)\n",
        "tests/cluster/test_follower.py"
        "::test_a_batch_that_finds_no_room_in_one_piece_is_applied_in_halves",
    ),
    # Log.
    bug(
        "a fenced sequencer still appends",
        "cluster/sqlite_log.py",
        "            if epoch != current:\n"
        "                raise Fenced(partition, epoch, current)\n"
        "            first =",
        "            first =",
        "tests/cluster/test_update_log.py::test_a_later_writer_fences_the_earlier_one",
    ),
    Mutant(
        "updates are acked before they are synced",
        (
            Edit("cluster/sqlite_log.py", "_FULL = 2\n", "_FULL = 1\n"),
            Edit(
                "cluster/sqlite_log.py",
                '            one.execute("PRAGMA synchronous=FULL")\n',
                '            one.execute("PRAGMA synchronous=NORMAL")\n',
            ),
        ),
        "tests/cluster/test_sqlite_log.py::test_what_was_acknowledged_survives_a_power_cut",
    ),
    bug(
        "the log is trimmed beyond a cut that is kept",
        "cluster/sqlite_log.py",
        "min(bounds if lowest is None else [*bounds, lowest])",
        "min(bounds)",
        "tests/cluster/test_update_log.py::test_trimming_never_passes_a_pin",
    ),
    bug(
        "a version below the newest is accepted",
        "cluster/sequencer.py",
        "        if write.version and write.version < now.version:\n",
        "        if write.version and write.version < 0:\n",
        "tests/cluster/test_sequencer.py"
        "::test_a_version_below_the_newest_is_refused_with_the_newest",
    ),
    bug(
        "an append without an answer is forgotten",
        "cluster/sequencer.py",
        "        self._unanswered.add(partition)\n        try:\n",
        "        try:\n",
        "tests/cluster/test_sequencer.py::test_nothing_gets_into_the_log_behind_a_decision",
    ),
    # Fences, budgets and times.
    bug(
        "a router takes an older map",
        "cluster/router.py",
        "        if shard_map.version < known.version:\n",
        "        if shard_map.version < 1:\n",
        "tests/cluster/test_router.py"
        "::test_an_older_map_is_refused_but_that_of_another_start_of_the_cluster_is_taken",
    ),
    bug(
        "an incarnation that was replaced may still answer",
        "cluster/links.py",
        "            if entry is not None and entry.epoch > epoch != entry.relieves:\n",
        "            if entry is not None and entry.epoch < epoch != entry.relieves:\n",
        "tests/cluster/test_links.py::test_answers_of_an_epoch_that_a_newer_map_fences_are_refused",
    ),
    bug(
        "a call does not say which incarnation it is for",
        "cluster/shard_connection.py",
        "        call.epoch = self.entry.epoch\n",
        "        call.epoch = 0\n",
        "tests/cluster/test_links.py::test_a_call_names_the_incarnation_and_the_time_left",
    ),
    bug(
        "hedges cost nothing",
        "cluster/extra_calls.py",
        "        return not self._is_hot() and self._hedges.take()\n",
        "        return not self._is_hot()\n",
        "tests/cluster/test_extra_calls.py"
        "::test_hedges_and_retries_stay_within_their_shares_however_many_are_wanted",
    ),
    bug(
        "every bad replica is ejected",
        "cluster/replica_choice.py",
        "        most = math.floor(self._health.max_ejected * len(replicas) + 1e-9)\n",
        "        most = len(replicas)\n",
        "tests/cluster/test_replica_choice.py"
        "::test_no_more_than_the_share_is_ejected_and_of_the_others_the_least_bad_is_asked",
    ),
    bug(
        "a shard is not told how little time is left",
        "cluster/shard_connection.py",
        "        call.remaining_us = max(0, int(remaining_s * 1e6))\n",
        "        call.remaining_us = max(0, int(remaining_s * 1e9))\n",
        "tests/cluster/test_links.py::test_a_call_names_the_incarnation_and_the_time_left",
    ),
    bug(
        "a shard answers for a generation that it does not hold",
        "cluster/hosting.py",
        "        raise GenerationError(generation, served[-1].generation if served else 0)\n",
        "        return served[-1]\n",
        "tests/cluster/test_hosting.py::test_a_generation_is_let_go_of_and_its_follower_ends",
    ),
    bug(
        "a generation goes live before every process has it",
        "deploy/generation_watch.py",
        "        is_whole = prepared == len(counted) and shards ==",
        "        is_whole = prepared > 0 and shards ==",
        "tests/deploy/test_generation_watch.py"
        "::test_the_live_generation_changes_once_every_process_has_the_new_one_prepared",
    ),
    bug(
        "nobody looks whose time is over in the queue",
        "cluster/batcher.py",
        "            loop.call_later(max(deadline_s - now_s, 0.0) + SOON_S, self._sweep)\n",
        "            loop.call_later(max(deadline_s - now_s, 0.0) + 60.0, self._sweep)\n",
        "tests/cluster/test_batcher.py"
        "::test_who_waits_is_told_when_the_time_is_over_although_nothing_begins_or_ends",
    ),
    bug(
        "a replica that has lost what was open is taken for one that has it",
        "cluster/rounds.py",
        "        return len(found) == len(missing)\n",
        "        return True\n",
        "tests/cluster/test_rounds.py"
        "::test_an_answer_of_a_replica_that_took_over_is_of_its_cut_alone",
    ),
    # What takes chance to happen.
    bug(
        "the merge leaves a shard out",
        "cluster/rounds.py",
        "            seconds = [self._closed[shard] for shard in self._fanout.alive]\n",
        "            seconds = [self._closed[shard] for shard in self._fanout.alive][:2]\n",
        simulation(1, 2000),
    ),
    bug(
        "a shard that did not answer counts as covered",
        "cluster/fanout.py",
        "            documents=self.coverage_of(alive),\n",
        "            documents=self.coverage_of(range(len(self.documents))),\n",
        simulation(1, 2000),
    ),
    bug(
        "who is slower goes on",
        "cluster/races.py",
        "                self._cancel(other)\n",
        "                del other\n",
        simulation(1, 2000),
    ),
)
