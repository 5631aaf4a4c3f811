"""Mutants of digests that callers gave, of what several readers share, and of work in threads."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

DIGESTS = "runtime/digests.py"
TENANCY = "runtime/tenancy.py"
ONCE = "io/sources/opened_once.py"
MERGED = "io/sources/merged.py"
MERGED_READER = "io/sources/merged_reader.py"
HOLD = "io/sources/local_hold.py"
THREADS = "adapters/loading/threads.py"

OF_DIGESTS = "test_digests.py"
WAITING = "test_digests_waiting.py"
NOBODY_WAITS = f"{WAITING}::test_hashing_ends_when_nobody_waits_for_it"
AT_CLOSE = f"{WAITING}::test_who_waits_when_it_closes_waits_no_longer"
SPLIT = "io/test_split_reader.py"
ACROSS = f"{SPLIT}::test_a_read_across_a_border_ends_before_its_files_are_closed"
OF_MERGED = "io/test_merged_source.py"
ROWS = "io/test_merged_rows.py"
MERGE_FAILURES = "test_merge_failures.py"
ASYNC = "adapters/test_weights_async.py"

OF_COMPARING: Mutants = {
    "digests: who waits for all waits for the comparison": mutant(
        DIGESTS,
        "                await lease.verified(check)\n",
        "                pass\n",
        f"{OF_DIGESTS}::test_other_weights_are_refused_for_who_gave_it",
    ),
    "digests: what the source finds is waited for": mutant(
        DIGESTS,
        "            await tenancy.until(lambda: tenancy.verification is not None, tenancy.check)\n",
        "",
        f"{OF_DIGESTS}::test_what_the_source_found_is_not_computed_again",
    ),
    "digests: who waits in a thread is woken": mutant(
        DIGESTS,
        "        promise.settle(_kept(ref), error)\n        tenancy.wake_threads()\n",
        "        promise.settle(_kept(ref), error)\n",
        f"{OF_DIGESTS}::test_who_waits_for_a_copy_in_a_thread_need_not_wait_for_its_end",
    ),
    "digests: who waits on the loop is woken": mutant(
        DIGESTS,
        "        tenancy.wake_threads()\n        tenancy.wake_tasks()\n",
        "        tenancy.wake_threads()\n",
        f"{OF_DIGESTS}::test_other_weights_are_refused_for_who_gave_it",
    ),
    "digests: it is settled before anybody is woken": mutant(
        DIGESTS,
        """\
        promise.settle(_kept(ref), error)
        tenancy.wake_threads()
        tenancy.wake_tasks()
""",
        """\
        tenancy.wake_threads()
        tenancy.wake_tasks()
        await asyncio.sleep(0)
        promise.settle(_kept(ref), error)
""",
        f"{OF_DIGESTS}::test_other_weights_are_refused_for_who_gave_it",
    ),
    "digests: who waits when it closes is woken": mutant(
        DIGESTS,
        "            lease.tenancy.wake_tasks()\n",
        "            pass\n",
        AT_CLOSE,
    ),
    "digests: hashing goes on without its first asker": mutant(
        DIGESTS,
        "            return await asyncio.shield(question.task)\n",
        "            return await question.task\n",
        f"{NOBODY_WAITS}",
    ),
    "digests: hashing ends when nobody waits for it": mutant(
        DIGESTS,
        "                del self._asking[key]\n                question.task.cancel()\n",
        "                del self._asking[key]\n",
        NOBODY_WAITS,
    ),
    "digests: several wait for one hashing": mutant(
        DIGESTS,
        "        question = self._asking.get(key) or self._ask(key)\n",
        "        question = self._ask(key)\n",
        f"{OF_DIGESTS}::test_the_files_are_hashed_once_for_all",
    ),
    "digests: a comparison ends with its last lease": mutant(
        TENANCY,
        "        if not self._leases and self.task is not None:  # which may be done\n",
        "        if False:\n",
        NOBODY_WAITS,
    ),
    "digests: a clone keeps the comparison": mutant(
        TENANCY,
        "        if not self._leases and self.task is not None:  # which may be done\n",
        "        if self.task is not None:\n",
        NOBODY_WAITS,
    ),
    "digests: nothing is verified while a promise is open": mutant(
        TENANCY,
        "        pending = self.promise is not None and self.promise.pending\n",
        "        pending = False\n",
        f"{OF_DIGESTS}::test_other_weights_are_refused_for_who_gave_it",
    ),
    "digests: what is stopped is waited for": mutant(
        DIGESTS,
        "        await asyncio.gather(*tasks, return_exceptions=True)\n",
        "",
        "test_ending.py::test_questions_that_are_stopped_are_waited_for",
    ),
    "tenancy: what was verified wakes tasks": mutant(
        TENANCY,
        "        self.verification = self.verification or verification\n        self.wake_tasks()\n",
        "        self.verification = self.verification or verification\n",
        "test_verified.py::test_a_load_is_there_before_it_is_verified",
    ),
}

OF_READERS: Mutants = {
    "opened once: it is closed after its last user": mutant(
        ONCE,
        "            unused = not self._closed and not self._users\n",
        "            unused = not self._closed\n",
        ACROSS,
        f"{OF_MERGED}::test_closed_while_it_is_read_it_reads_to_the_end",
    ),
    "opened once: the last user closes it": mutant(
        ONCE,
        "            last = self._closed and not self._users\n",
        "            last = False\n",
        ACROSS,
    ),
    "opened once: one read opens": mutant(
        ONCE,
        "        with self._opening:\n",
        "        if self._opening:\n",
        f"{SPLIT}::test_many_first_reads_open_it_once",
    ),
    "opened once: what is closed is opened no more": mutant(
        ONCE,
        "            if self._closed:\n                raise FetchError(self._too_late)\n",
        "",
        f"{SPLIT}::test_a_closed_reader_reads_no_more",
    ),
    "merged: each thread has a tensor of its own": mutant(
        MERGED_READER,
        "        thread = get_ident()\n",
        "        thread = next(iter(self._cut), 0)\n",
        f"{ROWS}::test_threads_that_take_turns_compute_their_tensors_once",
    ),
    "merged: a group is here when every part's bytes are": mutant(
        MERGED,
        "            if not left[group]:\n",
        "            if left[group] >= 0:\n",
        f"{OF_MERGED}::test_a_group_is_here_with_the_last_of_its_parts",
    ),
    "merged: parts that are given up are waited for": mutant(
        MERGED,
        "        await asyncio.gather(*tasks, return_exceptions=True)\n",
        "",
        f"{OF_MERGED}::test_when_a_part_fails_the_others_have_ended",
    ),
    "merged: parts end with the one that failed": mutant(
        MERGED,
        "            task.cancel()\n",
        "",
        f"{OF_MERGED}::test_when_a_part_fails_the_others_have_ended",
    ),
    "merged: parts that were opened in vain are closed": mutant(
        MERGED,
        "            task.add_done_callback(partial(_undo, undo))\n",
        "",
        f"{MERGE_FAILURES}::test_a_part_that_fails",
    ),
    "merged: parts that come back are whole before they are read": mutant(
        MERGED,
        "            await self._bring(key, opened, whole, lambda _: None, demand)\n",
        "",
        "io/remote/test_remote_evicted.py::test_parts_of_a_merge_are_fetched_again",
    ),
    "merged: who reads in a thread hears that the loop has ended": mutant(
        MERGED,
        "        except CancelledError:\n",
        "        except ZeroDivisionError:\n",
        "io/test_merged_ends.py",
    ),
    "local: what is held is what was opened": mutant(
        HOLD,
        "            reader.read_into([], 0)\n",
        "",
        "io/test_local_hold.py::test_a_file_that_changes_is_not_held",
    ),
    "threads: who is not waited for need not go on": mutant(
        THREADS,
        "        abandoned.set()\n",
        "",
        f"{ASYNC}::test_a_cancelled_load_stops_at_the_next_layer",
    ),
    "threads: what came too late is discarded": mutant(
        THREADS,
        "        outcome.add_done_callback(settle)\n",
        "",
        f"{ASYNC}::test_a_cancelled_opening_leaves_no_file_open",
    ),
    "threads: what was cancelled does not begin": mutant(
        THREADS,
        "        if not outcome.set_running_or_notify_cancel():\n            return\n",
        "        outcome.set_running_or_notify_cancel()\n",
        f"{ASYNC}::test_a_call_that_is_cancelled_before_its_thread_begins",
    ),
}

DIGESTS_AND_READERS: Mutants = {**OF_COMPARING, **OF_READERS}
