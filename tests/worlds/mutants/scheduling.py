"""The scheduler: claims, batches, slots and ends of requests."""

from collections.abc import Sequence

from lorax_async.scheduler.adapter_queues import AdapterQueues
from lorax_async.scheduler.look_ahead import LoadQueue
from lorax_async.scheduler.requests import AdapterQueue, Ticket
from lorax_async.scheduler.scheduler import Batch
from mutants.mutation import Mutants, mutant, skipped

BATCHES = "scheduler/test_scheduler.py"
ENDS = "scheduler/test_scheduler_ends.py"

_release_batch = AdapterQueues.release_batch


def _never(kept: object) -> property:
    """An attribute that always has its initial value."""
    return property(lambda _: kept, lambda _, __: None)


def _given_back_after_the_first(
    self: AdapterQueues, adapter_queues: Sequence[AdapterQueue]
) -> None:
    for adapter_queue in adapter_queues:
        adapter_queue.batch_count = 1
    _release_batch(self, adapter_queues)


def _forgotten_but_loaded(self: LoadQueue, adapter_queue: AdapterQueue) -> None:
    load_task = self._load_tasks.pop(adapter_queue, None)
    if load_task is not None:
        self._take_out(load_task)


SCHEDULING: Mutants = {
    "scheduler: a request is in one batch at a time": mutant(
        f"{BATCHES}::test_several_batches_may_be_under_way",
        (Ticket, "in_batch", _never(kept=False))),
    "scheduler: a slot is kept for its batches": mutant(
        f"{BATCHES}::test_an_adapter_is_given_back_after_the_last_of_its_batches",
        (AdapterQueues, "release_batch", _given_back_after_the_first)),
    "scheduler: a batch is valid while its slots are its own": mutant(
        f"{BATCHES}::test_a_stale_batch_is_caught", skipped(Batch, "check")),
    "scheduler: a slot held in vain makes way": mutant(
        f"{BATCHES}::test_a_request_that_may_not_begin_gives_its_slot_to_one_that_has_begun",
        skipped(AdapterQueues, "yield_slot")),
    "scheduler: tokens of false weights do not count": mutant(
        f"{ENDS}::test_a_token_of_false_weights_does_not_count",
        skipped(AdapterQueues, "check_integrity")),
    "scheduler: a preempted request gives its place back": mutant(
        f"{BATCHES}::test_preempting_ends", skipped(AdapterQueues, "preempt")),
    "scheduler: a load ends with its last request": mutant(
        f"{ENDS}::test_a_load_ends_with_its_last_request",
        (LoadQueue, "remove", _forgotten_but_loaded)),
    "scheduler: a request joins the version that its ref means now": mutant(
        "runtime/test_freshness.py::test_a_replaced_adapter_serves_only_requests_that_began_before",
        skipped(AdapterQueues, "_is_current", True)),
    "scheduler: close waits for its loads": mutant(
        f"{ENDS}::test_close_waits_for_its_loads", skipped(LoadQueue, "close")),
}  # fmt: skip
