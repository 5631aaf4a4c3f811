"""Mutants of adapters that are given as tensors: copying, spilling, taking turns, digests."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

SPILLING = "io/spilling.py"
SPILLED = "io/spilled.py"
COPIES = "io/host_copies.py"
FROM_MEMORY = "io/sources/from_memory.py"
SNAPSHOT = "io/snapshot.py"
GIVING = "runtime/giving.py"
TURNS = "runtime/turns.py"
RETIRING = "runtime/retiring.py"

OF_SPILLING = "io/test_spilling.py"
OF_MEMORY = "io/test_memory_source.py"
YET_TO_WRITE = (
    "io/test_snapshot.py::TestOfDevices::test_what_its_stream_has_yet_to_write_is_waited_for"
)
RACES = "test_spill_races.py"
ENDS = "test_spill_ends.py"
IN_USE = f"{OF_SPILLING}::test_what_is_read_or_copied_now_is_waited_for"
HAS_MEMORY = f"{OF_SPILLING}::test_who_has_the_memory_keeps_it_and_who_needs_it_waits"
BESIDE = "test_replace_beside_loads.py"
REPLACED = "test_replace_races.py"
IN_ORDER = f"{BESIDE}::test_several_at_once_come_in_their_order"
GIVEN = "test_from_memory.py"

OF_COPIES: Mutants = {
    "spilling: claims are granted in their order": mutant(
        SPILLING,
        "        async with self._order:\n",
        "        if self._order:\n",
        f"{RACES}::test_others_come_in_their_order",
    ),
    "spilling: who waits for room hears of it": mutant(
        SPILLING,
        "            with self._copies.watched(tell):\n",
        "            if tell:\n",
        IN_USE,
    ),
    "spilling: the loop is woken": mutant(
        SPILLING,
        "                loop.call_soon_threadsafe(changed.set)\n",
        "                loop.call_soon(changed.set)\n",
        f"{OF_SPILLING}::test_each_reader_that_leaves_is_heard_of",
    ),
    "spilling: who waits looks again after a change": mutant(
        SPILLING,
        "                    changed.clear()\n",
        "",
        f"{OF_SPILLING}::test_each_reader_that_leaves_is_heard_of",
    ),
    "spilling: nothing begins once it is closed": mutant(
        SPILLING,
        "                    check_open()\n",
        "",
        f"{OF_SPILLING}::test_once_it_is_closed_nothing_goes_any_more",
    ),
    "spilling: what goes is read to its end": mutant(
        SPILLING,
        "self._write, copy, copy.open(), demand)",
        'self._write, copy, open("/dev/null"), demand)',
        f"{ENDS}::test_a_deadline_passes_meanwhile",
    ),
    "spilling: it ends when nobody waits": mutant(
        SPILLING,
        "            demand.end()\n",
        "            pass\n",
        f"{ENDS}::test_cancelled_it_ends_between_two_pieces",
    ),
    "spilling: it ends when it is dropped": mutant(
        COPIES,
        "            self.moving.end()\n",
        "            pass\n",
        f"{OF_SPILLING}::test_what_is_dropped_need_not_go_on",
    ),
    "spilling: what was dropped meanwhile goes from the disk": mutant(
        COPIES,
        "            left = home if self._dropped else self._home\n",
        "            left = self._home\n",
        f"{RACES}::test_it_is_unloaded",
    ),
    "spilling: what was written is removed once nobody reads it": mutant(
        SPILLING,
        "            self._threads.submit(self._remove_left)\n",
        "            pass\n",
        f"{OF_SPILLING}::test_what_is_dropped_is_read_to_its_end_and_then_removed",
    ),
    "spilling: its end is waited for": mutant(
        SPILLING,
        "        self._threads.shutdown()\n",
        "        self._threads.shutdown(wait=False)\n",
        f"{ENDS}::test_the_loader_closes_meanwhile",
    ),
    "spilling: what is left at the end is removed": mutant(
        SPILLING,
        "        self._threads.shutdown()\n        self._remove_left()\n",
        "        self._threads.shutdown()\n",
        f"{ENDS}::test_the_loader_closes_meanwhile",
    ),
    "spilled: what is there already is checked": mutant(
        SPILLED,
        "cache.open(key, check=True)",
        "cache.open(key)",
        "io/test_spilling_left.py::test_wrong_bytes_under_its_name_are_never_read",
    ),
    "spilled: half of it is not left": mutant(
        SPILLED,
        "        download.discard()\n",
        "        download.close()\n",
        f"{ENDS}::test_the_loader_closes_meanwhile",
    ),
    "spilled: writing ends between two pieces": mutant(
        SPILLED,
        "                _require(demand)\n                file.write",
        "                file.write",
        f"{ENDS}::test_cancelled_it_ends_between_two_pieces",
    ),
    "spilled: hashing ends between two pieces": mutant(
        SPILLED,
        "        _require(demand)\n        found.update",
        "        found.update",
        f"{OF_SPILLING}::test_what_is_dropped_need_not_go_on",
    ),
    "spilled: who reads it keeps it": mutant(
        SPILLED,
        "        self._users.join()\n",
        "",
        f"{OF_SPILLING}::test_it_is_opened_like_a_file",
    ),
    "copies in memory: who reads one keeps its room": mutant(
        COPIES,
        "        self._users.join()\n",
        "",
        HAS_MEMORY,
        IN_USE,
    ),
    "copies in memory: who leaves is heard of": mutant(
        COPIES,
        "        self._users.leave()\n        self._changed()\n",
        "        self._users.leave()\n",
        IN_USE,
    ),
    "copies in memory: a thread that still copies has its room": mutant(
        FROM_MEMORY,
        "                running.add_done_callback(lambda _: claim.end())\n",
        "                claim.end()\n",
        f"{OF_MEMORY}::test_a_thread_that_still_copies_has_the_room",
    ),
    "copies in memory: nothing begins once it is closed": mutant(
        FROM_MEMORY,
        "                check_open()\n",
        "",
        f"{OF_MEMORY}::test_nothing_begins_once_it_is_closed",
    ),
    "copies in memory: room is claimed before it is copied": mutant(
        FROM_MEMORY,
        "            return self.copies.claim(nbytes)\n",
        "            return Claim(0, lambda _: None)\n",
        f"{OF_MEMORY}::test_the_budget_counts_what_is_being_copied",
    ),
    "snapshot: writes meanwhile are noticed": mutant(
        SNAPSHOT,
        "        self._require_unchanged()\n",
        "",
        "io/test_snapshot.py::test_a_write_at_any_time_is_noticed",
    ),
    "snapshot: what a device has yet to write is waited for": mutant(
        SNAPSHOT,
        "            event.synchronize()\n",
        "            pass\n",
        YET_TO_WRITE,
    ),
    "snapshot: its event stands behind what the stream has yet to write": mutant(
        SNAPSHOT,
        "            event.record(stream_on(device, None))\n",
        "",
        YET_TO_WRITE,
    ),
}

OF_NAMES: Mutants = {
    "giving: calls with one name come in their order": mutant(
        GIVING,
        "                        await come_first()\n",
        "                        pass\n",
        IN_ORDER,
    ),
    "giving: who leaves early leaves a gap": mutant(
        TURNS,
        "            if before is None or before.done():\n",
        "            if True:\n",
        IN_ORDER,
    ),
    "giving: what a call is about stays": mutant(
        GIVING,
        " and key not in self._calls:\n",
        ":\n",
        f"{REPLACED}::test_while_its_turn_has_not_come_the_same_is_unloaded_elsewhere",
    ),
    "giving: what is given again is kept": mutant(
        GIVING,
        "        self._driver.retiring.keep(key)\n",
        "",
        "test_replace.py::test_back_and_forth",
    ),
    "giving: what is leaving is loaded again before it is pinned": mutant(
        GIVING,
        "        if not all(interest.pin(name, lease) for name in pinned):\n",
        "        if any([]) and all(interest.pin(name, lease) for name in pinned):\n",
        f"{REPLACED}::test_the_new_one_is_leaving_when_it_is_to_be_pinned",
    ),
    "retiring: who holds or wants it keeps it": mutant(
        RETIRING,
        "        if life is not None and (life.leases or life.pins or life.waiters):\n",
        "        if life is not None and life.leases:\n",
        f"{GIVEN}::test_who_waits_while_it_is_unloaded_gets_it_and_then_it_goes",
    ),
    "retiring: who holds it keeps it": mutant(
        RETIRING,
        "        if life is not None and (life.leases or life.pins or life.waiters):\n",
        "        if life is not None and (life.pins or life.waiters):\n",
        "test_replace.py::test_back_and_forth",
    ),
    "retiring: they leave one by one": mutant(
        RETIRING,
        "        if not self._keys or self._looking:\n",
        "        if not self._keys:\n",
        "test_many_leave.py",
    ),
    "retiring: it is gone when it is idle": mutant(
        RETIRING,
        "        if life is None or life.is_idle:\n",
        "        if True:\n",
        f"{REPLACED}::test_while_the_old_one_computes",
    ),
}

MEMORY: Mutants = {**OF_COPIES, **OF_NAMES}
