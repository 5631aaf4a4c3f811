"""Mutants of the range engine: threads, connections, and what is told when."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

_NAMES = ("desk", "crew", "download", "attempt", "wire", "pool", "exchange", "network", "asking")
DESK, CREW, DOWNLOAD, ATTEMPT, WIRE, POOL, EXCHANGE, NETWORK, ASKING = (
    f"io/http/{name}.py" for name in _NAMES
)

ENDS = "io/http/test_http_ends.py"
ENGINE = "io/http/test_http_engine.py"
FAULTS = "io/http/test_http_faults.py"
SERVERS = "io/http/test_http_servers.py"
PLACES = "io/http/test_http_places.py"
TRUST = "io/http/test_http_trust.py"
FROM_OUTSIDE = f"{ENDS}::test_an_end_from_outside"
IN_ORDER = f"{SERVERS}::test_every_byte_once_in_order"

HTTP: Mutants = {
    "http: an outcome is told when the last thread has left": mutant(
        DESK,
        "            if not job.over or job.running or job not in self.jobs:\n",
        "            if not job.over or job not in self.jobs:\n",
        FROM_OUTSIDE,
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
    "http: where they are too many all wait": mutant(
        DESK,
        "            self.not_before = max(self.not_before, piece.not_before)\n",
        "",
        f"{SERVERS}::test_too_many_connections_for_the_server",
        SERVERS,
        FAULTS,
    ),
    "http: the foreground goes first": mutant(
        DESK,
        "key=lambda job: (job.urgency, len(job.running) - parts[job])",
        "key=lambda job: (0, len(job.running) - parts[job])",
        f"{ENGINE}::test_the_foreground_goes_first",
        ENGINE,
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
        FROM_OUTSIDE,
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
    "http: threads that begin wake the clock": mutant(
        CREW,
        "        self._woken.set()\n        self._desk.finish(job)\n",
        "        self._desk.finish(job)\n",
        ENDS,
        ENGINE,
    ),
    "http: idle threads end": mutant(
        CREW,
        "                if self._desk.clock() >= late:\n                    break\n",
        "",
        f"{ENDS}::test_idle_threads_and_connections_end",
    ),
    "http: idle connections end": mutant(
        CREW,
        "        kept = self._pool.expire()\n",
        "        kept = False\n",
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
        IN_ORDER,
        SERVERS,
        ENDS,
    ),
    "http: groups are told of by one thread at a time": mutant(
        DOWNLOAD,
        "                if self._telling or not self._news:\n",
        "                if not self._news:\n",
        IN_ORDER,
        ENGINE,
    ),
    "http: nothing is written after the end": mutant(
        DOWNLOAD,
        """\
            if self.over:
                raise AbortedError
            left =""",
        "            left =",
        FROM_OUTSIDE,
        ENDS,
    ),
    "http: one response is the whole": mutant(
        DOWNLOAD,
        "                raise AbortedError  # another thread saw it first\n",
        "                pass\n",
        f"{SERVERS}::test_a_server_that_sends_all_or_nothing",
    ),
    "http: others end where one response is the whole": mutant(
        DOWNLOAD,
        "                if other is not attempt:\n                    other.end()\n",
        "                pass\n",
        f"{SERVERS}::test_a_server_that_sends_all_or_nothing",
    ),
    "http: who was ended before he had a connection is told": mutant(
        ATTEMPT,
        "        if ended:\n            raise AbortedError\n",
        "",
        FROM_OUTSIDE,
        ENDS,
        PLACES,
    ),
    "http: an end reaches a thread that waits": mutant(
        ATTEMPT,
        "            wire.abort()\n",
        "            pass\n",
        FROM_OUTSIDE,
    ),
    "http: an end does not reach a connection that was given back": mutant(
        EXCHANGE,
        "        self._attempt.leave()\n        connection, self._connection",
        "        connection, self._connection",
        ENDS,
        ENGINE,
    ),
    "http: a connection is given back when its response was read": mutant(
        EXCHANGE,
        "        if self.body.done and self.head.keeps_alive:\n",
        "        if self.head.keeps_alive:\n",
        SERVERS,
        FAULTS,
    ),
    "http: an end reaches a socket that is being opened": mutant(
        WIRE,
        "            aborted = self._aborted\n        if aborted:\n            raise AbortedError\n",
        "",
        PLACES,
        ENDS,
    ),
    "http: an end is no end of the body": mutant(
        WIRE,
        "        if self._aborted and not count:  # what came before is good\n"
        "            raise AbortedError\n",
        "",
        FROM_OUTSIDE,
        ENDS,
        SERVERS,
    ),
    "http: an end closes nothing under a thread that reads": mutant(
        WIRE,
        "                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)\n",
        "                    self._socket.close()\n",
        FROM_OUTSIDE,
        ENDS,
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
