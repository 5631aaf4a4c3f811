"""Mutants of files that are open or mapped, and of models that compute with adapters."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

OPEN, LOCAL, MAPPED = "io/sources/checked_open.py", "io/sources/local.py", "io/mapped.py"
BATCH = "engines/batch.py"

OF_OPEN = "io/test_checked_open.py"
OF_FILE_READER = "io/test_file_reader.py"
OUTLIVES = f"{OF_FILE_READER}::test_a_descriptor_outlives_the_read_it_serves"
GIVEN_UP = f"{OF_OPEN}::test_closed_even_when_the_open_was_given_up"
THREADS = "engines/test_attach_threads.py"

FILES: Mutants = {
    "reader: a descriptor outlives the read it serves": mutant(
        OPEN,
        "unused = not self._closed and not self._reading",
        "unused = not self._closed",
        OUTLIVES,
    ),
    "reader: the last read closes": mutant(
        OPEN,
        "            last = self._closed and not self._reading\n",
        "            last = False\n",
        OUTLIVES,
    ),
    "reader: one read opens": mutant(
        OPEN,
        "            with self._opening:\n",
        "            if self._opening:\n",
        "test_readers.py::test_two_who_read_first_open_once",
    ),
    "local: weights that are being opened are closed": mutant(
        LOCAL,
        "            opening.add_done_callback(_close)\n",
        "",
        GIVEN_UP,
    ),
    "local: an error waits for the other file": mutant(
        LOCAL,
        "                    await asyncio.wrap_future(opening)\n            raise",
        "                    pass\n            raise",
        f"{OF_OPEN}::test_an_error_waits_for_the_other_file",
    ),
    "local: a config is closed after its last hop": mutant(
        LOCAL,
        "            latest.add_done_callback(lambda _: _close(opening))\n",
        "            _close(opening)\n",
        GIVEN_UP,
        "io/test_local_source.py",
    ),
    "local: a hold that is being made is closed": mutant(
        LOCAL,
        "            beginning.add_done_callback(_close)\n",
        "",
        "io/test_local_hold.py",
        "io/test_local_source.py",
    ),
    "local: all pieces are here before the hold is": mutant(
        LOCAL,
        "                await loop.run_in_executor(self._threads, hold.populate, start)\n",
        "                loop.run_in_executor(self._threads, hold.populate, start)\n",
        "io/test_local_hold.py",
    ),
    "mapped: who populates keeps the map": mutant(
        MAPPED,
        """\
        address = ctypes.addressof(memory)
        try:
""",
        """\
        address = ctypes.addressof(memory)
        del memory
        memory = None
        try:
""",
        "io/test_mapped.py::test_closed_while_it_is_populated",
    ),
}

MODELS: Mutants = {
    "batch: adapters are in use while it runs": mutant(
        BATCH,
        "                uses.enter_context(handle.use())\n",
        "                handle.rank\n",
        f"{THREADS}::test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter",
    ),
    "batch: they are free after the last layer": mutant(
        BATCH,
        "            last = self._running == 0\n",
        "            last = self._ended\n",
        f"{THREADS}::test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter",
    ),
    "batch: no layer begins after its block": mutant(
        BATCH,
        "            if self._ended:\n",
        "            if False:\n",
        f"{THREADS}::test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter",
    ),
    "batch: a layer waits for its adapters": mutant(
        BATCH,
        "        handle.wait_layer(layer)\n",
        "",
        f"{THREADS}",
    ),
}

FILES_AND_MODELS: Mutants = {**FILES, **MODELS}
