"""Mutants of the range engine: who may begin what, when, and beside whom."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

DESK = "io/http/desk.py"
DOWNLOAD = "io/http/download.py"

OF_DESK = "io/http/test_http_desk.py"
WHOLE = "io/http/test_http_whole.py"
ENDS = "io/http/test_http_ends.py"
SERVERS = "io/http/test_http_servers.py"
NO_OTHER_PIECE = f"{OF_DESK}::test_who_is_turned_away_does_not_come_back_with_another_piece"
NO_PART = (
    f"{OF_DESK}::test_who_is_turned_away_does_not_come_back_with_a_part_of_what_another_brings"
)
NOT_ASKED_AGAIN = f"{OF_DESK}::test_a_source_that_sends_all_or_nothing_is_not_asked_again_before_the_time_it_named"
NOT_STUCK = f"{OF_DESK}::test_who_brings_something_is_not_stuck"
AFTER_AN_END = f"{WHOLE}::test_no_more_is_written_after_an_end"

ORIGINS: Mutants = {
    "desk: what another origin lacks is taken almost at once": mutant(
        DESK,
        "self._end(job, origin, excess, since, hurry=elsewhere)",
        "self._end(job, origin, excess, since, hurry=False)",
        f"{OF_DESK}::test_another_origin_has_its_share_at_once",
    ),
    "desk: an attempt that was ended is not ended twice": mutant(
        DESK,
        "        excess -= sum(attempt.ended for attempt in here)\n",
        "",
        f"{OF_DESK}::test_another_origin_has_its_share_at_once",
    ),
    "desk: what was tried comes after what was not": mutant(
        DESK,
        "            return job.urgency, job.is_retry(now), -owed",
        "            return job.urgency, False, -owed",
        f"{OF_DESK}::test_a_new_request_goes_first_where_there_is_room_for_both",
    ),
    "desk: what was set back was tried": mutant(
        DESK,
        "        piece.tried = True\n",
        "",
        f"{OF_DESK}::test_a_new_request_overtakes_retries",
    ),
    "desk: an origin that answers is not stalled": mutant(
        DESK,
        "                quiet.since = None\n",
        "                pass\n",
        f"{OF_DESK}::test_an_origin_that_answers_is_not_stalled",
    ),
}

WAITING: Mutants = {
    "desk: a piece that waits is not begun": mutant(
        DESK,
        "            if piece.not_before <= now:\n",
        "            if True:\n",
        f"{OF_DESK}::test_a_piece_that_waits_keeps_no_other",
    ),
    "desk: pieces that wait want no thread": mutant(
        DESK,
        "used + sum(p.not_before <= now for p in self.pending)",
        "used + len(self.pending)",
        f"{OF_DESK}::test_who_waits_leaves_its_share_to_others",
    ),
    "desk: who is turned away waits with all pieces": mutant(
        DESK,
        "            self.not_before = max(self.not_before, piece.not_before)\n",
        "",
        NO_OTHER_PIECE,
    ),
    "desk: of two times the later is waited for": mutant(
        DESK,
        "            self.not_before = max(self.not_before, piece.not_before)\n",
        "            self.not_before = piece.not_before\n",
        f"{OF_DESK}::test_of_two_times_the_later_is_waited_for",
    ),
    "desk: who waits with all pieces wants no thread": mutant(
        DESK,
        "        if now < self.not_before:\n            return used\n",
        "",
        NO_OTHER_PIECE,
    ),
    "desk: as many as were served come back": mutant(
        DESK,
        "            self.limit = max(1.0, min(self.limit, len(self.running)))\n",
        "",
        f"{OF_DESK}::test_as_many_as_were_served_come_back",
    ),
    "desk: what would be too late is not waited for": mutant(
        DESK,
        "        if wait is None or now + wait >= self.deadline:\n",
        "        if wait is None:\n",
        f"{SERVERS}::test_a_wait_beyond_the_deadline_is_not_waited",
    ),
    "desk: earlier pieces go first": mutant(
        DESK,
        "        insort(self.pending, piece, key=lambda each: each.order)\n",
        "        self.pending.append(piece)\n",
        f"{OF_DESK}::test_earlier_pieces_go_first_also_when_they_come_back",
    ),
    "desk: who is stuck has some time": mutant(
        DESK,
        "silent = [attempt for attempt in here if now - since[attempt] >= grace]",
        "silent = list(here)",
        NOT_STUCK,
    ),
    "desk: who brings something has it anew": mutant(
        DESK,
        "            seen.came, seen.since = came, now\n",
        "            seen.came = came\n",
        NOT_STUCK,
    ),
    "desk: what is over stays over": mutant(
        DESK,
        "        piece = self.running.pop(attempt)\n        if self.over:\n            return\n",
        "        piece = self.running.pop(attempt)\n",
        f"{ENDS}::test_an_end_from_outside",
    ),
    "desk: who waits for an outcome cannot take it away": mutant(
        DESK,
        "        self.done.set_running_or_notify_cancel()\n",
        "",
        f"{OF_DESK}::test_who_waits_for_an_outcome_cannot_take_it_away",
    ),
    "desk: an outcome is told once": mutant(
        DESK,
        "            if not job.over or job.running or job not in self.jobs:\n",
        "            if not job.over or job.running:\n",
        f"{OF_DESK}::test_what_has_ended_ends_once",
    ),
}

DOWNLOADS: Mutants = {
    "download: it is done when its threads are through": mutant(
        DOWNLOAD,
        "        self.over = not self.pending and not self.running\n",
        "        self.over = not self.pending\n",
        f"{SERVERS}::test_every_byte_once_in_order",
    ),
    "download: who is turned away does not share what another brings": mutant(
        DOWNLOAD,
        "            or now < self.not_before\n",
        "",
        NO_PART,
    ),
    "download: what is being read is not given to another": mutant(
        DOWNLOAD,
        "            left = (max(piece.at, piece.claimed), piece.stop)\n",
        "            left = (piece.at, piece.stop)\n",
        f"{OF_DESK}::test_what_is_being_read_is_not_given_to_another",
    ),
    "download: nothing is read after an end": mutant(
        DOWNLOAD,
        "            if self.over:\n                raise AbortedError\n            left",
        "            left",
        AFTER_AN_END,
    ),
    "download: nothing is read of all after an end": mutant(
        DOWNLOAD,
        "            if self.over:\n                raise AbortedError\n            return overlaps",
        "            return overlaps",
        AFTER_AN_END,
    ),
    "download: who tells looks again for what came meanwhile": mutant(
        DOWNLOAD,
        "        while self._news:\n",
        "        if self._news:\n",
        f"{SERVERS}::test_a_group_is_told_of_when_its_bytes_are_there_and_after_those_before_it",
    ),
    "download: who has an answer with all ends the others": mutant(
        DOWNLOAD,
        "                    other.end()\n",
        "                    pass\n",
        f"{WHOLE}::test_who_waits_for_an_answer_leaves_it_to_the_one_that_came",
    ),
    "download: one answer with all counts": mutant(
        DOWNLOAD,
        "            if self._stream is not None:\n"
        "                raise AbortedError  # another thread saw it first\n",
        "",
        f"{WHOLE}::test_of_two_answers_that_have_all_one_counts",
    ),
    "download: one answer is all": mutant(
        DOWNLOAD,
        "            self._stream is not None\n            or now",
        "            now",
        f"{OF_DESK}::test_nothing_is_asked_for_beside_all",
    ),
    "download: all waits for the time that was named for a part": mutant(
        DOWNLOAD,
        "        ready = now >= max(self.not_before, self._stream.not_before)\n",
        "        ready = now >= self._stream.not_before\n",
        NOT_ASKED_AGAIN,
    ),
    "download: all waits for its own time": mutant(
        DOWNLOAD,
        "        ready = now >= max(self.not_before, self._stream.not_before)\n",
        "        ready = now >= self.not_before\n",
        NOT_ASKED_AGAIN,
    ),
}

HTTP_DESK: Mutants = {**ORIGINS, **WAITING, **DOWNLOADS}
