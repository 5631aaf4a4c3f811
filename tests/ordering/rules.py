"""Mutants of the rules: what must be over before something is given away."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

DECISIONS, LIFECYCLE, QUEUES = (f"core/{name}.py" for name in ("decisions", "lifecycle", "queues"))
HOST_TIER, LIFE = "core/host_tier.py", "core/life.py"
HOLDERS_OF_SLOTS = "core/holders.py"


def world(name: str) -> str:
    return f"core/test_lifecycle_model.py::test_every_reachable_state_is_sound[{name}]"


ONE_SLOT = world("two adapters, one slot, all wait")
STREAMS = world("two adapters, streaming leases, all wait")
UNLOAD = world("unload beside loads")
IMAGES = world("images, unload and failures")
BETWEEN = world("an image between two slots, no failure")
PINS = world("pins and ageing")
COPY_QUEUE = "core/test_copy_queue.py"

SLOTS: Mutants = {
    "slot: it is free after its copies": mutant(
        DECISIONS,
        "if life.copying or life.uses or life.leases:",
        "if life.uses or life.leases:",
        ONE_SLOT,
    ),
    "slot: it is free after its kernels": mutant(
        DECISIONS,
        "if life.copying or life.uses or life.leases:",
        "if life.copying or life.leases:",
        ONE_SLOT,
    ),
    "slot: it is free after its leases": mutant(
        DECISIONS,
        "if life.copying or life.uses or life.leases:",
        "if life.copying or life.uses:",
        ONE_SLOT,
        UNLOAD,
    ),
    "slot: its column is cleared before others are given it": mutant(
        DECISIONS,
        "        commands, self._commands = self._commands, []\n",
        """\
        commands = sorted(self._commands, key=lambda each: isinstance(each, ClearColumn))
        self._commands = []
""",
        ONE_SLOT,
    ),
    "slot: who streams keeps it": mutant(
        DECISIONS,
        "if life.slot is not SlotState.FILLING or life.leases:",
        "if life.slot is not SlotState.FILLING:",
        "test_streaming.py::test_layers_come_one_by_one",
    ),
    "slot: it is evicted after its leases": mutant(
        DECISIONS,
        "if life.slot is not SlotState.RESIDENT or life.leases or life.pins:",
        "if life.slot is not SlotState.RESIDENT or life.pins:",
        "test_unload.py::test_what_is_leased_stays_and_its_holders_are_named",
    ),
    "slot: what leaves takes no lease": mutant(
        DECISIONS,
        "        if tier >= Tier.STREAM and (life.departing or self.closing):\n",
        "        if tier >= Tier.STREAM and self.closing:\n",
        world("lookups and ageing"),
    ),
    "slot: nobody takes a lease while it closes": mutant(
        DECISIONS,
        "        if tier >= Tier.STREAM and (life.departing or self.closing):\n",
        "        if tier >= Tier.STREAM and life.departing:\n",
        PINS,
        world("pins"),
    ),
    "slot: who wants all layers waits for the last": mutant(
        DECISIONS,
        "        if tier is Tier.STREAM:\n            return life.slot",
        "        if tier >= Tier.STREAM:\n            return life.slot",
        ONE_SLOT,
    ),
    "slot: a kernel outlives its lease": mutant(
        LIFECYCLE,
        "        life.uses += in_use\n",
        "",
        ONE_SLOT,
    ),
    "slot: layers are ready in their order": mutant(
        LIFECYCLE,
        "        while life.done >> life.watermark & 1:\n            life.watermark += 1\n",
        "        life.watermark = life.done.bit_count()\n",
        ONE_SLOT,
    ),
    "slot: it waits for what leaves by itself": mutant(
        QUEUES,
        """\
        if self._residency.fits_after(free_soon, sizes):
            return None
""",
        "",
        "test_room.py::test_what_leaves_already_is_waited_for",
    ),
    "slot: where nobody may go at once, who was told to is waited for": mutant(
        QUEUES,
        """\
            if self._residency.fits_after([life.grant for life in going if life.grant], sizes):
                return None
""",
        "",
        "test_room.py::test_one_of_two_is_told_to_leave",
    ),
    "slot: who found no room looks again when a holder changes": mutant(
        QUEUES,
        "            self._no_room = None\n",
        "            pass\n",
        ONE_SLOT,
    ),
    "slot: a holder that changes is seen": mutant(
        HOLDERS_OF_SLOTS,
        "now = (life.slot, life.departing, life.pins > 0, life.leases > 0)",
        "now = (life.slot, life.departing, life.pins > 0, False)",
        ONE_SLOT,
    ),
    "slot: who found no room looks again when time makes some": mutant(
        QUEUES,
        "            and self.now < self._no_room[1]\n",
        "",
        "test_waiting.py::test_and_goes_when_it_is_over",
    ),
    "slot: another who waits looks for himself": mutant(
        QUEUES,
        "            and self._no_room[0] == _wish(head)\n",
        "",
        "test_waiting.py",
    ),
    "slot: who was told to go need not once nobody waits": mutant(
        QUEUES,
        "                life.leaving = False\n",
        "",
        "test_room.py",
        "test_waiting.py",
    ),
    "slot: a victim may go": mutant(
        HOLDERS_OF_SLOTS,
        "return life.slot is SlotState.RESIDENT and not (life.departing or life.pins)",
        "return life.slot is SlotState.RESIDENT and not life.departing",
        world("pins of one of three"),
    ),
    "slot: a victim without leases goes first": mutant(
        HOLDERS_OF_SLOTS,
        "wanted=may_go(life) and not life.leases)",
        "wanted=may_go(life))",
        world("lookups and ageing"),
    ),
}

COPYING: Mutants = {
    "copy: it waits for its slot": mutant(
        QUEUES,
        "if life.slot is not SlotState.FILLING or not life.fetched & ~life.submitted:",
        "if not life.fetched & ~life.submitted:",
        ONE_SLOT,
    ),
    "copy: it waits for its bytes": mutant(
        LIFE,
        "ready = self.fetched & ~self.submitted",
        "ready = (1 << self.groups) - 1 & ~self.submitted",
        ONE_SLOT,
        STREAMS,
    ),
    "copy: it waits for a place": mutant(
        QUEUES,
        "while residency.copies_free and (key := self._line.head) is not None:",
        "while (key := self._line.head) is not None:",
        world("one copy at a time"),
    ),
    "copy: large ones leave room for who comes next": mutant(
        QUEUES,
        "_copy_order(life) if self._may_add(life) else None",
        "_copy_order(life)",
        f"{COPY_QUEUE}::test_one_with_large_groups_leaves_room_for_who_comes_next",
    ),
    "copy: its adapter's turn comes by the bytes it has moved": mutant(
        QUEUES,
        "            life.copy_turn += life.grant.extents[group].nbytes\n",
        "",
        f"{COPY_QUEUE}::test_the_small_ones_do_not_wait_for_the_large_one",
    ),
    "copy: who comes later has nothing in store": mutant(
        QUEUES,
        "life.copy_turn = max(life.copy_turn, self.turn)",
        "pass",
        f"{COPY_QUEUE}::test_shares_count_from_the_arrival_on",
    ),
    "image: it is warm once it was filled": mutant(
        QUEUES,
        "warm = bool(life.imaged >> group & 1)",
        "warm = life.image is not None",
        world("images for one of two"),
    ),
    "image: it stays while it is copied from": mutant(
        HOST_TIER,
        "return life.slot is not SlotState.FILLING and not life.copying",
        "return life.slot is not SlotState.FILLING",
        BETWEEN,
    ),
    "image: it is dropped after its copies": mutant(
        DECISIONS,
        "if life.image is not None and not life.copying and life.slot",
        "if life.image is not None and life.slot",
        IMAGES,
    ),
}

RULES: Mutants = {**SLOTS, **COPYING}
