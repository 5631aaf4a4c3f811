"""Mutants of requests under way: what ends them, and how their sequences are read."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

UNDER_WAY = "server/calls/under_way.py"
EVENTS = "server/calls/events.py"
CHOICES = "server/calls/choices.py"
ANSWERING = "server/calls/answering.py"

ENDS = "server/calls/test_server_ends.py"
CLIENTS = "server/calls/test_server_clients.py"
WATCHES = "server/calls/test_server_watches.py"
TURNS = "server/calls/test_server_turns.py"
OPENAI = "server/calls/test_server_openai.py"
LIMITS = "server/calls/test_server_limits.py"
DEADLINE = f"{ENDS}::test_after_the_deadline_the_rest_fails"
HANGS_UP = f"{CLIENTS}::test_who_hangs_up_frees_its_place"
SLOW = f"{CLIENTS}::test_who_is_slow_is_cut_off_wherever_it_stops"
CANCELLED = f"{CLIENTS}::test_a_cancelled_server_frees_all_places"
FIRST = f"{WATCHES}::test_the_first_reason_counts"
PRESENT = f"{WATCHES}::test_nobody_listens_to_a_client_that_has_its_answer"
LAST = f"{WATCHES}::test_the_last_one_ends_it"

SERVER_CALLS: Mutants = {
    "under way: who hangs up has gone, and nobody else": mutant(
        UNDER_WAY,
        '    while (await receive())["type"] != "http.disconnect":\n        pass\n',
        "    await receive()\n",
        f"{WATCHES}::test_only_who_hangs_up_has_gone",
    ),
    "under way: it waits until a client has gone": mutant(
        UNDER_WAY,
        "        await until_gone(self._receive)\n",
        "",
        f"{ENDS}::test_a_signal_drains",
    ),
    "under way: who has gone is told of": mutant(
        UNDER_WAY, "        self.interrupt(ClientGone())\n", "        pass\n", HANGS_UP
    ),
    "under way: the first reason counts": mutant(
        UNDER_WAY,
        "        if self._reason is None:\n            self._reason = reason\n",
        "        if True:\n            self._reason = reason\n",
        FIRST,
    ),
    "under way: a reason ends a wait": mutant(
        UNDER_WAY, "            self._task.cancel()\n", "", FIRST
    ),
    "under way: all can be ended": mutant(
        UNDER_WAY, "        self._watches.add(self)\n", "", DEADLINE
    ),
    "under way: who has ended is not ended": mutant(
        UNDER_WAY, "        self._watches.discard(self)\n", "", PRESENT
    ),
    "under way: who has ended listens no more": mutant(
        UNDER_WAY, "        self._listening.cancel()\n", "", PRESENT
    ),
    "under way: who is ended is not cancelled": mutant(
        UNDER_WAY,
        "self._task.uncancel() <= self._cancelling",
        "self._task.cancelling() - 1 <= self._cancelling",
        FIRST,
    ),
    "under way: who is cancelled besides is cancelled": mutant(
        UNDER_WAY,
        "        if self._task.uncancel() <= self._cancelling and kind is",
        "        if self._task.uncancel() >= 0 and kind is",
        f"{WATCHES}::test_who_is_cancelled_besides_stays_cancelled",
    ),
    "under way: the end takes no new ones": mutant(
        UNDER_WAY,
        "        if self.closing:\n            raise LoaderClosedError(CLOSING)\n",
        "",
        LAST,
    ),
    "under way: one that begins is waited for": mutant(
        UNDER_WAY, "        self._idle.clear()\n", "", LAST
    ),
    "under way: the last one ends it": mutant(
        UNDER_WAY,
        "            if not self._count:\n                self._idle.set()\n",
        "",
        LAST,
    ),
    "under way: only the last one ends it": mutant(
        UNDER_WAY,
        "            if not self._count:\n                self._idle.set()\n",
        "            self._idle.set()\n",
        LAST,
    ),
    "under way: whoever fails has ended": mutant(
        UNDER_WAY,
        """        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()
""",
        """        yield
        self._count -= 1
        if not self._count:
            self._idle.set()
""",
        LAST,
    ),
    "under way: who comes to its end too late is told": mutant(
        UNDER_WAY,
        "        if self._over:\n            raise LoaderClosedError(CLOSING)\n",
        "",
        f"{ENDS}::test_who_is_still_asking_is_told",
    ),
    "under way: those under way fail": mutant(
        UNDER_WAY,
        "            watch.interrupt(LoaderClosedError(CLOSING))\n",
        "            pass\n",
        DEADLINE,
    ),
    "under way: an end is waited for": mutant(
        UNDER_WAY, "                await self._idle.wait()\n", "                pass\n", LAST
    ),
    "under way: an end is not waited for for ever": mutant(
        UNDER_WAY, "asyncio.timeout(seconds)", "asyncio.timeout(None)", LAST
    ),
    "events: a client has its time": mutant(
        EVENTS, "asyncio.timeout(self._seconds)", "asyncio.timeout(None)", SLOW
    ),
    "events: what was told was taken": mutant(
        EVENTS,
        "                await self._send_on(message)\n                self.begun = True\n",
        "                self.begun = True\n                await self._send_on(message)\n",
        f"{TURNS}::test_nothing_was_told_before_it_was_taken",
    ),
    "events: who is slow is cut off": mutant(
        EVENTS,
        "        except TimeoutError:\n            await self._cut_off()\n",
        "        except TimeoutError:\n",
        SLOW,
    ),
    "events: a connection is cut": mutant(
        EVENTS, "            abort()\n", "            pass\n", SLOW
    ),
    "events: a cut connection has ended": mutant(
        EVENTS,
        "            await until_gone(self.receive)\n",
        "            pass\n",
        f"{TURNS}::test_who_is_cut_off_ends_when_its_connection_has",
    ),
    "choices: the first text of all comes first": mutant(
        CHOICES,
        "asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)",
        "asyncio.wait(self._reading)",
        f"{OPENAI}::test_a_streamed_completion_comes_as_it_is_made",
    ),
    "choices: what comes is waited for": mutant(
        CHOICES,
        "            await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)\n",
        "",
        f"{OPENAI}::test_a_completion_of_several_prompts",
    ),
    "choices: all take turns": mutant(
        CHOICES,
        "                self._read(writing)\n                return piece\n",
        "                others, self._reading = self._reading, {}\n"
        "                self._read(writing)\n"
        "                self._reading.update(others)\n"
        "                return piece\n",
        f"{TURNS}::test_all_sequences_take_turns",
    ),
    "choices: nothing is computed for who has gone": mutant(
        CHOICES, "            writing.cancel()\n", "            pass\n", HANGS_UP
    ),
    "choices: nothing is read for who has gone": mutant(
        CHOICES,
        "            task.cancel()\n",
        "            pass\n",
        f"{TURNS}::test_of_whom_is_cancelled_nothing_is_read_any_more",
    ),
    "choices: nothing is computed after a stop string": mutant(
        CHOICES,
        '            self._tokens.cancel()\n            self._ended = "stop"\n',
        '            self._ended = "stop"\n',
        f"{TURNS}::test_nothing_is_computed_after_a_stop_string",
    ),
    "choices: what is held back comes at the end": mutant(
        CHOICES,
        "            return self._stops.end()\n",
        '            return ""\n',
        f"{TURNS}::test_what_looked_like_a_stop_string_comes_out",
    ),
    "answering: an answer is under way": mutant(
        ANSWERING,
        "        with service.under_way.one():\n",
        "        if True:\n",
        f"{ENDS}::test_a_signal_drains",
    ),
    "answering: a client's adapter is counted": mutant(
        ANSWERING,
        "            with service.clients.using(client, adapter):\n",
        "            if True:\n",
        f"{LIMITS}::test_a_client_has_so_many_adapters_under_way",
    ),
    "answering: the loop is free while a prompt is read": mutant(
        ANSWERING,
        "await asyncio.to_thread(service.prompts.read, body)",
        "service.prompts.read(body)",
        f"{TURNS}::test_the_loop_is_free_while_a_prompt_is_read",
    ),
    "answering: it has room before its prompt is read": mutant(
        ANSWERING,
        "            service.require_room(1)  # to be refused costs little\n",
        "",
        f"{TURNS}::test_where_there_is_no_room_no_prompt_is_read",
    ),
    "answering: all of it has room": mutant(
        ANSWERING,
        "        self._service.require_room(len(generations))\n",
        "",
        f"{LIMITS}::test_a_full_queue_refuses",
    ),
    "answering: however it ends nothing more is computed": mutant(
        ANSWERING,
        """        try:
            for generation in generations:
                writings.append(self._writing(len(writings), body, generation))
            yield choices
        finally:
            choices.close()
""",
        """        for generation in generations:
            writings.append(self._writing(len(writings), body, generation))
        yield choices
        choices.close()
""",
        CANCELLED,
    ),
    "answering: where one is refused all are": mutant(
        ANSWERING,
        """        try:
            for generation in generations:
                writings.append(self._writing(len(writings), body, generation))
            yield choices
""",
        """        for generation in generations:
            writings.append(self._writing(len(writings), body, generation))
        try:
            yield choices
""",
        f"{TURNS}::test_where_one_is_refused_all_are",
    ),
    "answering: an error before the first text is a status": mutant(
        ANSWERING,
        "    piece = await choices.next()\n    await stream.begin()\n",
        "    await stream.begin()\n    piece = await choices.next()\n",
        "server/calls/test_server_refusals.py::test_the_official_client_raises",
    ),
}
