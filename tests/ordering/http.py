"""Mutants of the range engine: threads, connections, and what is told when."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

DESK = "io/http/desk.py"
CREW = "io/http/crew.py"
DOWNLOAD = "io/http/download.py"
ATTEMPT = "io/http/attempt.py"
WIRE = "io/http/wire.py"
POOL = "io/http/pool.py"
EXCHANGE = "io/http/exchange.py"
NETWORK = "io/http/network.py"

ENDS = "io/http/test_http_ends.py"
ENGINE = "io/http/test_http_engine.py"
SERVERS = "io/http/test_http_servers.py"
PLACES = "io/http/test_http_places.py"
PARTS = "io/http/test_http_parts.py"
FROM_OUTSIDE = f"{ENDS}::test_an_end_from_outside"
IN_ORDER = f"{SERVERS}::test_every_byte_once_in_order"

HTTP: Mutants = {
    "http: an outcome is told when the last thread has left": mutant(
        DESK,
        "            if not job.over or job.running or job not in self.jobs:\n",
        "            if not job.over or job not in self.jobs:\n",
        f"{ENDS}::test_an_end_is_told_when_nobody_writes_any_more",
    ),
    "http: threads of what is over are told": mutant(
        DESK,
        "                attempt.end()\n\n    def _set_back",
        "                pass\n\n    def _set_back",
        FROM_OUTSIDE,
    ),
    "http: what sets back is tried again after a while": mutant(
        DESK,
        "        piece.not_before = now + wait\n",
        "        piece.not_before = now\n",
        f"{SERVERS}::test_retry_after_is_waited_for_without_a_connection",
    ),
    "http: the foreground goes first": mutant(
        DESK,
        "Claim(job.urgency, len(read)",
        "Claim(0, len(read)",
        f"{ENGINE}::test_the_foreground_goes_first",
    ),
    "http: a long piece makes way": mutant(
        DOWNLOAD,
        "                return 0\n",
        "                pass\n",
        f"{ENGINE}::test_a_long_piece_makes_way",
    ),
    "http: who is stuck makes way": mutant(
        CREW,
        "            self._desk.reclaim()\n",
        "            pass\n",
        f"{ENGINE}::test_who_is_stuck_makes_way",
    ),
    "http: what is late ends": mutant(
        CREW,
        "        for job in late:\n            self._desk.finish(job)\n",
        "",
        FROM_OUTSIDE,
        f"{ENDS}::test_no_more_threads",
    ),
    "http: its end waits for its threads": mutant(
        CREW,
        "            thread.join()\n",
        "            break\n",
        f"{ENDS}::test_the_engine_has_ended_when_nobody_writes_any_more",
    ),
    "http: its end ends all jobs": mutant(
        CREW,
        '            job.cancel(FetchError("the engine was closed"))\n',
        "            pass\n",
        FROM_OUTSIDE,
    ),
    "http: nothing begins after its end": mutant(
        CREW,
        '                raise FetchError("the engine is closed", retryable=False)\n',
        "                pass\n",
        f"{ENDS}::test_the_closed_take_no_more",
    ),
    "http: an outcome is told by the last thread": mutant(
        CREW,
        """\
                self._desk.changed.notify()
        self._desk.finish(job)
""",
        "                self._desk.changed.notify()\n",
        IN_ORDER,
    ),
    "http: what is here already ends at once": mutant(
        CREW,
        "        self._woken.set()\n        self._desk.finish(job)\n",
        "        self._woken.set()\n",
        f"{SERVERS}::test_all_is_there_already",
    ),
    "http: idle threads end": mutant(
        CREW,
        "                if self._desk.clock() >= late:\n                    break\n",
        "",
        f"{ENDS}::test_idle_threads_and_connections_end",
    ),
    "http: idle connections end": mutant(
        CREW,
        "        kept = self._pool.expire() or busy\n",
        "        kept = busy\n",
        f"{ENDS}::test_idle_threads_and_connections_end",
    ),
    "http: bytes are in the sink when a group is told of": mutant(
        DOWNLOAD,
        """\
            self._write(piece.at, buffer[:got])
            with self.desk.changed:
                self._landed((piece.at, piece.at + got))
                piece.at += got
""",
        """\
            with self.desk.changed:
                self._landed((piece.at, piece.at + got))
            self._tell()
            self._write(piece.at, buffer[:got])
            with self.desk.changed:
                piece.at += got
""",
        f"{SERVERS}::test_a_group_is_told_of_when_its_bytes_are_there_and_after_those_before_it",
    ),
    "http: groups are told of by one thread at a time": mutant(
        DOWNLOAD,
        "                if self._telling or not self._news:\n",
        "                if not self._news:\n",
        f"{SERVERS}::test_a_group_is_told_of_when_its_bytes_are_there_and_after_those_before_it",
    ),
    "http: who was ended before he had a connection is told": mutant(
        ATTEMPT,
        "        if ended:\n            raise AbortedError\n",
        "",
        f"{PARTS}::test_who_was_ended_gets_no_connection",
    ),
    "http: an end reaches a thread that waits": mutant(
        ATTEMPT,
        "                self._wire.abort()\n",
        "                pass\n",
        FROM_OUTSIDE,
    ),
    "http: an end does not reach a connection that was given back": mutant(
        ATTEMPT,
        "                self._received += self._wire.received\n            self._wire = None\n",
        "                pass\n",
        f"{PARTS}::test_an_end_does_not_reach_what_was_given_back",
    ),
    "http: a connection is given back when its response was read": mutant(
        EXCHANGE,
        "        if self.body.done and self.head.keeps_alive:\n",
        "        if self.head.keeps_alive:\n",
        f"{SERVERS}::test_small_files_whole",
    ),
    "http: an end reaches a socket that is being opened": mutant(
        WIRE,
        "            aborted = self._aborted\n        if aborted:\n            raise AbortedError\n",
        "",
        f"{PARTS}::test_a_socket_is_not_opened_for_who_was_ended",
    ),
    "http: an end closes nothing under a thread that reads": mutant(
        WIRE,
        "                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)\n",
        "                    self._socket.close()\n",
        FROM_OUTSIDE,
    ),
    "http: an idle connection on which something came is none": mutant(
        POOL,
        "            if connection.wire.quiet:\n",
        "            if True:\n",
        f"{SERVERS}::test_what_comes_unasked_answers_nothing",
    ),
    "http: a name is looked up until somebody gives up": mutant(
        NETWORK,
        "            waited += 0.05\n            look()\n",
        "            waited += 0.05\n",
        f"{PLACES}::test_a_name_service_that_does_not_answer",
    ),
    "http: a name that is being looked up is not looked up twice": mutant(
        NETWORK,
        "                self._running[host, port] = lookup\n",
        "                self._running[host, port] = lookup\n"
        "                self._running[host, id(lookup)] = self._running.pop((host, port))\n",
        f"{PLACES}::test_a_name_service_that_does_not_answer",
    ),
}
