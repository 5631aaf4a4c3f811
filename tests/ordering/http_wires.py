"""Mutants of the range engine: a connection, and whoever uses, ends or looks for it."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

ATTEMPT = "io/http/attempt.py"
WIRE = "io/http/wire.py"
STREAM = "io/http/stream.py"
POOL = "io/http/pool.py"
EXCHANGE = "io/http/exchange.py"
NETWORK = "io/http/network.py"

WIRES = "io/http/test_http_wires.py"
NAMES = "io/http/test_http_names.py"
TOLD_SO = f"{WIRES}::test_who_was_ended_is_told_so_and_no_other_error"
CAME_BEFORE = f"{WIRES}::test_who_was_ended_gets_what_came_before"

HTTP_WIRES: Mutants = {
    "wire: who was ended while he waited for bytes is told so": mutant(
        WIRE,
        "        if self._aborted and not count:  # what came before is good\n"
        "            raise AbortedError\n",
        "",
        TOLD_SO,
    ),
    "wire: who was ended while he sent is told so": mutant(
        WIRE,
        "            if self._aborted:\n                raise AbortedError from None\n",
        "",
        TOLD_SO,
    ),
    "wire: what came before an end is read": mutant(
        WIRE,
        "        if self._aborted and not count:  # what came before is good\n",
        "        if self._aborted:\n",
        CAME_BEFORE,
    ),
    "wire: what came before an end is handed on": mutant(
        STREAM,
        "                if not got:\n                    raise\n                break\n",
        "                raise\n",
        CAME_BEFORE,
    ),
    "wire: a descriptor is closed after it was ended": mutant(
        WIRE,
        "        with self._lock:\n            if self._socket is not None:\n"
        "                self._socket.close()\n",
        "        if self._lock:\n            if self._socket is not None:\n"
        "                self._socket.close()\n",
        f"{WIRES}::test_a_descriptor_is_not_closed_while_it_is_ended",
    ),
    "wire: an end reaches a socket that is being secured": mutant(
        WIRE,
        "        with self._lock:  # wrapping moves the descriptor to another object\n",
        "        if self._lock:\n",
        f"{WIRES}::test_an_end_reaches_a_socket_that_is_being_secured",
    ),
    "wire: what is being ended is given back afterwards": mutant(
        ATTEMPT,
        "            if self._wire is not None:\n                self._wire.abort()\n",
        "            wire = self._wire\n        if wire is not None:\n            wire.abort()\n",
        f"{WIRES}::test_what_is_being_ended_is_given_back_afterwards",
    ),
    "wire: it is left before it is given back": mutant(
        EXCHANGE,
        "        self._attempt.leave()\n",
        "",
        f"{WIRES}::test_an_end_does_not_reach_a_connection_that_is_given_back",
    ),
    "stream: a head comes in time": mutant(
        STREAM,
        "            if self._clock() > late:\n",
        "            if False:\n",
        f"{WIRES}::test_a_head_comes_in_time",
    ),
    "stream: what drips is ended": mutant(
        STREAM,
        "            if rate < self._timeouts.slowest:\n",
        "            if False:\n",
        "io/http/test_http_parts.py::test_what_drips_is_too_slow",
    ),
    "pool: who was ended closes what he took": mutant(
        POOL,
        "                except BaseException:\n                    connection.wire.close()\n"
        "                    raise\n",
        "                except BaseException:\n                    raise\n",
        f"{WIRES}::test_who_was_ended_closes_what_he_took",
    ),
    "pool: an idle connection is taken by one": mutant(
        POOL,
        "        with self._lock:\n            for n in range",
        "        if self._lock:\n            for n in range",
        f"{WIRES}::test_an_idle_connection_is_taken_by_one",
    ),
    "pool: it is idle from when it was given": mutant(
        POOL,
        """\
        connection.idle_since = self._clock()
        with self._lock:
            self._idle.append(connection)
            many""",
        """\
        with self._lock:
            self._idle.append(connection)
        connection.idle_since = self._clock()
        with self._lock:
            many""",
        f"{WIRES}::test_a_connection_is_idle_from_when_it_was_given",
    ),
    "pool: what is given back after its end is closed": mutant(
        POOL,
        "            many = self._closed or len(self._idle)",
        "            many = len(self._idle)",
        "io/http/test_http_crew.py::test_a_thread_of_its_own_may_end_it",
    ),
    "pool: who is ended while he connects is told so": mutant(
        POOL,
        "            attempt.look()\n            raise failed_io",
        "            raise failed_io",
        f"{WIRES}::test_who_is_ended_while_he_connects_is_told_so",
    ),
    "names: who looks one up gives up in time": mutant(
        NETWORK,
        "            if waited >= timeout:\n",
        "            if False:\n",
        f"{NAMES}::test_a_name_is_given_up_in_time",
    ),
    "names: two who ask at once share a question": mutant(
        NETWORK,
        "        with self._lock:\n            lookup = self._running",
        "        if self._lock:\n            lookup = self._running",
        f"{NAMES}::test_two_who_ask_at_once_share_a_question",
    ),
    "names: an answer is for those who asked before": mutant(
        NETWORK,
        "        with self._lock:\n            del self._running[host, port]\n"
        "        lookup.done.set()\n",
        "        lookup.done.set()\n"
        "        with self._lock:\n            del self._running[host, port]\n",
        f"{NAMES}::test_an_answer_is_for_those_who_asked_before",
    ),
}
