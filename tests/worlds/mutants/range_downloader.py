"""The range downloader: ends of attempts, repeated reads, shared connections."""

from typing import Any

from lorax_async.formats.spans import ByteRange
from lorax_async.http import client, connection
from lorax_async.http.connection import Attempt, Connection
from lorax_async.http.download_scheduler import DownloadPiece, DownloadScheduler, WorkerPool
from lorax_async.http.range_downloader import Download
from lorax_async.http.ranges import GroupArrivals
from mutants.mutation import Mutants, NoLock, mutant, skipped

ANSWERS = "http/test_http_responses.py"
SCHEDULER = "http/test_download_scheduler.py"
DOWNLOADS = "http/test_http_downloads.py"

_write, _landed = Download._write, GroupArrivals.landed
_claim, _split, _use = Download._claim, Download.split, Attempt.use


def _used_after_an_end(self: Attempt, used: Connection) -> None:
    self.ended, ended = False, self.ended
    _use(self, used)
    self.ended = ended


def _attached_after_an_abort(self: Connection, opened: Any) -> None:
    self._socket = opened


def _written_later(self: Download, offset: int, data: memoryview) -> None:
    late = vars(self).setdefault("late", [])
    late.append((offset, memoryview(bytes(data))))
    if len(late) > 1:
        _write(self, *late.pop(0))


def _reported_in_part(self: GroupArrivals, span: ByteRange) -> list[int]:
    _landed(self, span)
    return self.groups_in(span)


def _claimed_after_an_end(self: Download, piece: DownloadPiece, most: int) -> int:
    with self.scheduler.changed:
        over, self.over = self.over, False
        count = _claim(self, piece, most)
        self.over = over
    return count


def _split_while_read(self: Download, now: float) -> DownloadPiece | None:
    claims = {piece: piece.claimed for piece in self.running.values()}
    for piece in claims:
        piece.claimed = piece.at
    part = _split(self, now)
    for piece, claimed in claims.items():
        piece.claimed = claimed
    return part


HTTP: Mutants = {
    "attempt: one that was ended gets no connection": mutant(
        f"{SCHEDULER}::test_an_ended_attempt_gets_no_connection",
        (Attempt, "use", _used_after_an_end)),
    "attempt: an end does not reach a connection that was given back": mutant(
        f"{SCHEDULER}::test_an_end_does_not_reach_what_was_released", skipped(Attempt, "release")),
    "attempt: a connection is given back after its end": mutant(
        f"{SCHEDULER}::test_what_is_being_ended_is_released_afterwards",
        (connection, "Lock", NoLock)),
    "socket: an end reaches a thread that waits": mutant(
        f"{DOWNLOADS}::test_an_end_from_outside", skipped(Connection, "abort")),
    "socket: an end reaches a socket that is being opened": mutant(
        f"{SCHEDULER}::test_an_ended_attempt_gets_no_connection",
        (Connection, "attach", _attached_after_an_abort)),
    "socket: a descriptor is not closed while it is shut down": mutant(
        f"{SCHEDULER}::test_a_descriptor_is_not_closed_while_it_is_aborted",
        (connection, "Lock", NoLock)),
    "pool: an idle connection is taken by one": mutant(
        f"{SCHEDULER}::test_an_idle_connection_is_taken_by_one", (client, "Lock", NoLock)),
    "pool: unasked bytes answer no request": mutant(
        f"{ANSWERS}::test_what_comes_unasked_answers_nothing",
        (Connection, "is_quiet", property(lambda _: True))),
    "download: bytes are written before their group is reported": mutant(
        f"{ANSWERS}::test_a_group_is_reported_once_its_bytes_are_there",
        (Download, "_write", _written_later)),
    "download: a group is reported when all of it is there": mutant(
        f"{ANSWERS}::test_a_group_is_reported_once_its_bytes_are_there",
        (GroupArrivals, "landed", _reported_in_part)),
    "download: nothing is read after an end": mutant(
        f"{ANSWERS}::test_no_more_is_written_after_an_end",
        (Download, "_claim", _claimed_after_an_end)),
    "download: what is being read is not given to another thread": mutant(
        f"{SCHEDULER}::test_what_is_being_read_is_not_given_to_another",
        (Download, "split", _split_while_read)),
    "download: what is left of a piece is put back": mutant(
        f"{DOWNLOADS}::test_a_long_piece_makes_way", skipped(Download, "put_back")),
    "shares: another origin gets its share from one that stalls": mutant(
        f"{SCHEDULER}::test_an_origin_that_stalls_keeps_one_connection",
        skipped(DownloadScheduler, "reclaim")),
    "downloader: it has ended when its threads have": mutant(
        f"{DOWNLOADS}::test_an_end_is_reported_once_nothing_is_written_any_more",
        skipped(WorkerPool, "_running_thread")),
}  # fmt: skip
