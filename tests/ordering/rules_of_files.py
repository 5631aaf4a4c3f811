"""Mutants of the rules: when a file, its pages and what was unloaded are gone."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant
from ordering.rules import DECISIONS, HOST_TIER, IMAGES, LIFE, ONE_SLOT, UNLOAD, world

HOST = world("host memory and unload")
HOST_OF_TWO = world("host memory for one of two")

RULES_OF_FILES: Mutants = {
    "file: it is gone after its fetch": mutant(
        DECISIONS,
        "if life.fetch_running or life.copying or life.host",
        "if life.copying or life.host",
        ONE_SLOT,
    ),
    "file: it is gone after its copies": mutant(
        DECISIONS,
        "if life.fetch_running or life.copying or life.host",
        "if life.fetch_running or life.host",
        IMAGES,
    ),
    "file: it is gone after its pages": mutant(
        DECISIONS,
        "life.copying or life.host is not HostState.NONE:",
        "life.copying:",
        HOST,
    ),
    "file: it is fetched again after it has ended": mutant(
        DECISIONS,
        "if life.file is not FileState.ABSENT or not life.waiters",
        "if life.file not in (FileState.ABSENT, FileState.ENDING) or not life.waiters",
        ONE_SLOT,
    ),
    "host: pages are free once they were released": mutant(
        DECISIONS,
        """\
        life.host = HostState.RELEASING
        self.command(Release(life.key, life.attempt))
""",
        """\
        self.host.release(life.key)
        life.host = HostState.NONE
        self.command(Release(life.key, life.attempt))
""",
        HOST_OF_TWO,
    ),
    "host: who wants pages waits for those that are released": mutant(
        HOST_TIER,
        """\
        if self._budget.free + leaving >= nbytes:
            return None
""",
        "",
        "test_host_tier.py::test_the_coldest_makes_room_within_the_budget",
    ),
    "host: who wants pages waits until they are free": mutant(
        HOST_TIER,
        """\
        if nbytes > self._budget.free:
            return self._make_room(nbytes)
""",
        "",
        HOST_OF_TWO,
    ),
    "host: one is populated at a time": mutant(
        HOST_TIER,
        "        if key is None or self._budget.populating is not None:\n",
        "        if key is None:\n",
        HOST_OF_TWO,
        world("some can be held"),
    ),
    "host: it is reached once it is populated": mutant(
        LIFE,
        "return self.host is HostState.HELD or self.has_whole_image",
        "return self.host is not HostState.NONE or self.has_whole_image",
        HOST_OF_TWO,
    ),
    "unload: it is over after the slot": mutant(
        DECISIONS,
        "        if not life.unloads or life.slot is not SlotState.NONE:\n",
        "        if not life.unloads:\n",
        UNLOAD,
    ),
    "unload: it is over after the pages": mutant(
        DECISIONS,
        "        if life.host is not HostState.NONE or life.image is not None:\n",
        "        if life.image is not None:\n",
        HOST,
    ),
    "close: it waits for pages on their way": mutant(
        LIFE,
        "return self.slot is SlotState.NONE and self.file in RESTING and host_rests",
        "return self.slot is SlotState.NONE and self.file in RESTING",
        HOST,
    ),
    "close: it waits for files on their way": mutant(
        LIFE,
        "return self.slot is SlotState.NONE and self.file in RESTING and host_rests",
        "return self.slot is SlotState.NONE and host_rests",
        world("little is remembered"),
    ),
    "close: it waits for slots": mutant(
        LIFE,
        "return self.slot is SlotState.NONE and self.file in RESTING and host_rests",
        "return self.file in RESTING and host_rests",
        world("little is remembered"),
    ),
}
