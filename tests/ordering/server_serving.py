"""Mutants of the server on uvicorn: its signals, its ends, and the time that a head has."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

SERVING = "server/serving.py"

ENDS = "server/calls/test_server_ends.py"
STOPS = "server/calls/test_server_stops.py"
DRAINS = f"{ENDS}::test_a_signal_drains"
SECOND = f"{ENDS}::test_a_second_signal_ends_it_now"
DEADLINE = f"{ENDS}::test_after_the_deadline_the_rest_fails"
BY_FORCE = f"{STOPS}::test_left_by_force_it_leaves_nothing"
HEAD = f"{STOPS}::test_a_head_has_its_time_from_its_beginning"
CUT_OFF = "server/calls/test_server_long_bodies.py::test_a_head_that_does_not_end_is_cut_off"

SERVER_SERVING: Mutants = {
    "serving: it takes nothing after its end": mutant(
        SERVING,
        "            self._under_way.close()\n            self._service",
        "            self._service",
        f"{ENDS}::test_a_loop_may_be_left_by_force",
    ),
    "serving: looks at the loop end with it": mutant(
        SERVING,
        "            self._service.metrics.close()\n",
        "",
        "server/calls/test_server_metrics.py::test_looks_at_the_loop_end_with_the_server",
    ),
    "serving: left by force it cuts off": mutant(
        SERVING, "            await self._cut_off(sockets or ())\n", "", BY_FORCE
    ),
    "serving: however it ends it cuts off": mutant(
        SERVING,
        """        try:
            await super().serve(sockets)
        finally:
            self._under_way.close()
            self._service.metrics.close()
            await self._cut_off(sockets or ())
""",
        """        await super().serve(sockets)
        self._under_way.close()
        self._service.metrics.close()
        await self._cut_off(sockets or ())
""",
        BY_FORCE,
    ),
    "serving: a second signal ends those under way": mutant(
        SERVING,
        "        if self._under_way.closing:\n            self._under_way.fail()\n",
        "",
        SECOND,
    ),
    "serving: a first signal ends nobody": mutant(
        SERVING,
        "        if self._under_way.closing:\n            self._under_way.fail()\n",
        "        self._under_way.fail()\n",
        DRAINS,
    ),
    "serving: a signal takes no new ones": mutant(
        SERVING,
        "        self._under_way.close()\n        self._service.watching",
        "        self._service.watching",
        SECOND,
    ),
    "serving: a signal ends it": mutant(
        SERVING,
        "        self.should_exit = True\n",
        "",
        f"{ENDS}::test_connections_that_ask_nothing_are_closed",
    ),
    "serving: a signal wakes it": mutant(SERVING, "        self._stopped.set()\n", "", DRAINS),
    "serving: it is ready when it listens": mutant(
        SERVING,
        """        await super().startup(sockets)
        if self._ready is not None:
            self._ready()
""",
        """        if self._ready is not None:
            self._ready()
        await super().startup(sockets)
""",
        f"{STOPS}::test_it_is_ready_when_it_listens",
    ),
    "serving: it rests": mutant(
        SERVING,
        "                    await self._stopped.wait()\n",
        "                    pass\n",
        f"{STOPS}::test_dates_go_on",
    ),
    "serving: it looks at the time": mutant(
        SERVING,
        "asyncio.timeout(1)",
        "asyncio.timeout(None)",
        f"{STOPS}::test_dates_go_on",
    ),
    "serving: another thread hears no signals": mutant(
        SERVING,
        """            yield
            return
        before""",
        """            pass
        before""",
        f"{STOPS}::test_a_loop_of_another_thread_may_serve",
    ),
    "serving: signals are the program's again": mutant(
        SERVING,
        "                signal.signal(number, handler)\n",
        "                pass\n",
        DRAINS,
    ),
    "serving: however it ends signals are the program's again": mutant(
        SERVING,
        """        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
""",
        """        yield
        for number, handler in before.items():
            signal.signal(number, handler)
""",
        BY_FORCE,
    ),
    "serving: a signal wakes the loop": mutant(
        SERVING,
        "        self._loop.call_soon_threadsafe(self.stop)\n",
        "        self._loop.call_soon(self.stop)\n",
        f"{STOPS}::test_a_signal_wakes_a_loop_that_sleeps",
    ),
    "serving: whoever ends it, no new ones are taken": mutant(
        SERVING,
        "        self._under_way.close()\n        if not await",
        "        if not await",
        f"{STOPS}::test_who_ends_it_in_uvicorns_way_takes_no_new_ones",
    ),
    "serving: the end waits for those under way": mutant(
        SERVING,
        "        if not await self._under_way.ended(self._service.settings.drain):\n",
        "        if False:\n",
        DRAINS,
    ),
    "serving: those who take too long fail": mutant(
        SERVING,
        "            self._under_way.fail()\n        await super().shutdown(sockets)\n",
        "            pass\n        await super().shutdown(sockets)\n",
        DEADLINE,
    ),
    "serving: what was computed is taken": mutant(
        SERVING,
        "        await super().shutdown(sockets)\n",
        "",
        f"{STOPS}::test_what_was_computed_is_taken_to_its_end",
    ),
    "serving: who cuts off listens no more": mutant(
        SERVING, "            server.close()\n", "            pass\n", BY_FORCE
    ),
    "serving: a listener that was not begun with is closed": mutant(
        SERVING,
        "            listener.close()\n",
        "            pass\n",
        f"{STOPS}::test_one_that_cannot_begin_closes_its_listener",
    ),
    "serving: who cuts off closes connections": mutant(
        SERVING,
        "            cast(Any, connection).transport.abort()\n",
        "            pass\n",
        BY_FORCE,
    ),
    "serving: who cuts off waits for requests to end": mutant(
        SERVING,
        "            await asyncio.wait(tuple(self.server_state.tasks), timeout=LAST_SECONDS)\n",
        "            pass\n",
        BY_FORCE,
    ),
    "serving: the system waits no longer for a client": mutant(
        SERVING,
        "            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)\n",
        "",
        f"{STOPS}::test_who_takes_nothing_of_what_the_system_has_is_cut_off",
    ),
    "serving: a first head has its time": mutant(
        SERVING,
        "        super().connection_made(transport)\n        self._expect_a_head()\n",
        "        super().connection_made(transport)\n",
        CUT_OFF,
    ),
    "serving: a next head has its time": mutant(
        SERVING,
        "response_complete:\n            self._expect_a_head()\n",
        "response_complete:\n            pass\n",
        CUT_OFF,
    ),
    "serving: a head that has come is waited for no more": mutant(
        SERVING,
        "        else:\n            self._expect_nothing()\n",
        "",
        HEAD,
    ),
    "serving: who has gone is waited for no more": mutant(
        SERVING,
        "        self._expect_nothing()\n        super().connection_lost(exc)\n",
        "        super().connection_lost(exc)\n",
        HEAD,
    ),
    "serving: parts of a head have one time": mutant(
        SERVING,
        "        if self._too_slow is None and not self.transport.is_closing():\n",
        "        if not self.transport.is_closing():\n",
        HEAD,
    ),
    "serving: a time that is over is none": mutant(
        SERVING, "            self._too_slow.cancel()\n", "", HEAD
    ),
}
