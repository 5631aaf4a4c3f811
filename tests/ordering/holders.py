"""Mutants of waiting and holding: tenancies, leases, handles."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

TENANCY, TENANTS, HANDLE = "runtime/tenancy.py", "runtime/tenants.py", "handle.py"
INTEREST, MODULE_VIEWS = "runtime/interest.py", "runtime/module_views.py"

OF_TENANCY = "test_tenancy.py"
LEASES = "test_leases.py"
CLONE = "test_clone.py"
RELEASED = "test_streaming.py::test_a_release_ends_the_waits_of_others"
BEHIND_COPIES = f"{CLONE}::test_a_kernel_behind_copies_sees_their_bytes"

LAYERS: Mutants = {
    "tenancy: a layer needs its own group": mutant(
        TENANCY,
        "return place + 1 if present else 0",
        "return place if present else 0",
        f"{OF_TENANCY}::test_a_layer_is_ready_once_its_group_is",
    ),
    "tenancy: all copies have been asked for": mutant(
        TENANCY,
        "        return None if None in tickets else [",
        "        return [",
        BEHIND_COPIES,
    ),
    "tenancy: the copies before a layer's count, too": mutant(
        TENANCY,
        "groups = range(self._watermark, self._needed(layer))",
        "groups = range(max(self._watermark, self._needed(layer) - 1), self._needed(layer))",
        f"{LEASES}::test_a_layer_comes_after_those_before_it",
    ),
    "tenancy: a task waits for its layer": mutant(
        TENANCY,
        "        while not reached():\n",
        "        while False:\n",
        f"{OF_TENANCY}::test_tasks_wake_with_their_layer",
    ),
    "tenancy: a thread waits for its layer": mutant(
        TENANCY,
        "            return self._watermark >= needed\n",
        "            return True\n",
        f"{OF_TENANCY}::test_threads_wake_with_their_layer",
    ),
    "tenancy: a layer that came wakes threads": mutant(
        TENANCY,
        """\
            self._watermark = watermark
            self._changed.notify_all()
""",
        """\
            self._watermark = watermark
""",
        f"{OF_TENANCY}::test_threads_wake_with_their_layer",
    ),
    "tenancy: a layer that came wakes tasks": mutant(
        TENANCY,
        "        self._wake(watermark)\n",
        "",
        f"{OF_TENANCY}::test_tasks_wake_with_their_layer",
    ),
    "tenancy: a failure wakes threads": mutant(
        TENANCY,
        """\
            self.error = error
            self._changed.notify_all()
""",
        """\
            self.error = error
""",
        f"{OF_TENANCY}::test_a_failure_reaches_all_who_wait",
    ),
    "tenancy: a failure wakes tasks": mutant(
        TENANCY,
        """\
            self.error = error
            self._changed.notify_all()
        self._wake(len(self.layers))
""",
        """\
            self.error = error
            self._changed.notify_all()
""",
        f"{OF_TENANCY}::test_a_failure_reaches_all_who_wait",
    ),
    "tenancy: the end of a lease wakes threads": mutant(
        TENANCY,
        "        self.tenancy.wake_threads()\n",
        "",
        RELEASED,
    ),
    "tenants: the end of a lease wakes tasks": mutant(
        TENANTS,
        "        lease.tenancy.wake_tasks()\n",
        "",
        RELEASED,
    ),
    "handle: weights are shown once their layer is here": mutant(
        MODULE_VIEWS,
        "        if not self._lease.tenancy.is_ready(layer):\n",
        "        if layer is None:\n",
        "test_streaming.py::test_layers_come_one_by_one",
    ),
    "handle: a stream waits for every copy": mutant(
        HANDLE,
        "        for ticket in tickets:\n",
        "        for ticket in tickets[:-1]:\n",
        f"{CLONE}::test_a_stream_waits_for_the_layers_before_too",
    ),
    "handle: a stream waits for the copies of earlier layers": mutant(
        HANDLE,
        "        for ticket in tickets:\n",
        "        for ticket in tickets[-1:]:\n",
        f"{CLONE}::test_a_stream_waits_for_the_layers_before_too",
    ),
}

USES: Mutants = {
    "handle: a use ends when the device has computed": mutant(
        HANDLE,
        "        ticket.add_done_callback(lambda _: self._lease.end_use())\n",
        "        self._lease.end_use()\n",
        f"{CLONE}::test_a_slot_is_kept_until_the_device_has_computed",
    ),
    "handle: a use is noted when the block ends": mutant(
        HANDLE,
        """\
        try:
            yield
        finally:
            self._end_use(stream)
""",
        """\
        self._end_use(stream)
        yield
""",
        f"{CLONE}::test_a_slot_is_kept_until_the_device_has_computed",
    ),
    "handle: a use is of its stream": mutant(
        HANDLE,
        "self._device.note_use(stream)",
        "self._device.note_use(None)",
        CLONE,
    ),
    "lease: it ends in use": mutant(
        TENANCY,
        "            in_use = self._uses > 0\n",
        "            in_use = False\n",
        f"{OF_TENANCY}::test_a_kernel_outlives_its_lease",
    ),
    "lease: it is quiet after its last use": mutant(
        TENANCY,
        "quiet = self.closed and self._uses == 0",
        "quiet = self.closed",
        f"{OF_TENANCY}::test_a_kernel_outlives_its_lease",
    ),
    "lease: no use begins while it ends": mutant(
        TENANCY,
        """\
        with self._lock:
            self.check()
""",
        """\
        if True:
            self.check()
""",
        f"{LEASES}::test_an_end_while_a_use_begins_is_told_of_it",
    ),
    "lease: it does not end while a use begins": mutant(
        TENANCY,
        """\
        with self._lock:
            if self.closed:
                return
""",
        """\
        if True:
            if self.closed:
                return
""",
        f"{LEASES}::test_an_end_while_a_use_begins_is_told_of_it",
    ),
    "lease: a use ends before or after the lease": mutant(
        TENANCY,
        """\
        with self._lock:
            self._uses -= 1
""",
        """\
        if True:
            self._uses -= 1
""",
        f"{LEASES}::test_a_use_that_ends_first_is_not_spoken_of",
    ),
    "interest: unload waits until it is gone": mutant(
        INTEREST,
        "                await gone\n",
        "                pass\n",
        "test_unload.py::test_a_kernel_is_waited_for",
    ),
    "interest: who waits is there before it can be told": mutant(
        INTEREST,
        """\
        gone = self._tenants.add_unload(key)
        self._obey(self._lifecycle.unload(key))
""",
        """\
        self._obey(self._lifecycle.unload(key))
        gone = self._tenants.add_unload(key)
""",
        "test_unload.py::test_what_is_idle_goes_at_once",
    ),
}

HOLDERS: Mutants = {**LAYERS, **USES}
