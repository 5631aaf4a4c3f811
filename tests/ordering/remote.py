"""Mutants of work for adapters from elsewhere: in threads, and by the engine's jobs."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

WORKERS = "io/remote/workers.py"
JOBS = "io/remote/jobs.py"
INQUIRY = "io/remote/inquiry.py"

OF_WORKERS = "io/remote/test_remote_workers.py"
OF_SOURCE = "io/remote/test_remote_source.py"
LOADS = "io/remote/test_remote_loads.py"
URGENCY = "io/remote/test_fault_urgency.py"
WAITS = "io/remote/test_remote_waits.py"
LETS_GO = f"{OF_WORKERS}::test_what_lets_go_is_done_though_it_was_cancelled_before_it_began"
CLOSES = f"{OF_WORKERS}::test_closing_waits_for_what_was_submitted"
AT_ANY_AWAIT = f"{OF_SOURCE}::TestConformance::test_cancelled_at_any_await"
NOBODY_WAITS = f"{LOADS}::test_what_nobody_waits_for_ends_and_is_gone_on_with"

REMOTE: Mutants = {
    "workers: what came too late is undone": mutant(
        WORKERS,
        "                    undo(future.result())\n",
        "                    pass\n",
        AT_ANY_AWAIT,
    ),
    "workers: who is cancelled waits for the thread": mutant(
        WORKERS,
        """\
                await ended(future)
                if undo""",
        """\
                if not future.done():
                    raise
                if undo""",
        f"{OF_WORKERS}::test_who_is_cancelled_waits_for_the_thread_and_undoes_what_it_did",
    ),
    "workers: what lets go is waited for": mutant(
        WORKERS,
        """\
        await ended(future)
        future.result()
""",
        "        await outcome(future)\n",
        LETS_GO,
    ),
    "workers: it is waited for however often that is cancelled": mutant(
        WORKERS,
        "    while not future.done():\n",
        "    if not future.done():\n",
        LETS_GO,
    ),
    "workers: the loop is woken": mutant(
        WORKERS,
        "            loop.call_soon_threadsafe(tell)\n",
        "            loop.call_soon(tell)\n",
        LETS_GO,
    ),
    "workers: close waits for what was submitted": mutant(
        WORKERS,
        "        self.threads.shutdown()\n",
        "        self.threads.shutdown(wait=False)\n",
        CLOSES,
    ),
    "jobs: they end with the demand": mutant(
        JOBS,
        "            if demand.ended:\n",
        "            if False:\n",
        NOBODY_WAITS,
    ),
    "jobs: they are as urgent as the demand": mutant(
        JOBS,
        "                job.hasten(FOREGROUND)\n",
        "                pass\n",
        f"{URGENCY}::test_a_load_of_what_is_hinted_at_hastens_it",
    ),
    "jobs: changes of the demand are heard": mutant(
        JOBS,
        """\
        with demand.watched(follow):
            yield
""",
        """\
        follow()
        yield
""",
        NOBODY_WAITS,
        f"{URGENCY}::test_a_load_of_what_is_hinted_at_hastens_it",
    ),
    "jobs: they end when one of them fails": mutant(
        JOBS,
        """\
        for job in jobs:
            job.cancel(nobody_waits())
        for job""",
        "        for job",
        f"{WAITS}::test_jobs_end_with_whoever_follows_them",
    ),
    "jobs: their threads have left when that is told": mutant(
        JOBS,
        "            await ended(job.done)\n",
        "            pass\n",
        f"{WAITS}::test_jobs_end_with_whoever_follows_them",
    ),
    "inquiry: what was not answered is given up": mutant(
        INQUIRY,
        """\
                job.cancel(FetchError("nobody waits for the answer any more"))
""",
        "                pass\n",
        "io/remote/test_web_given_up.py",
    ),
}
