"""Mutants of the server's warm list."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

WARM = "server/warm_list.py"

OF_WARM = "server/test_warm_list.py"
ORDER = "server/test_warm_list_order.py"
NAMED = f"{OF_WARM}::test_who_is_on_the_device_is_named_the_last_one_used_first"
BACK = f"{OF_WARM}::test_the_next_one_brings_them_back"
WHILE = f"{ORDER}::test_what_changes_while_it_is_written_is_written_then"
LEAVING = f"{ORDER}::test_leaving_waits_for_what_is_written"
PAUSES = f"{ORDER}::test_it_is_written_once_in_a_pause_and_at_the_end"
COMING = f"{ORDER}::test_who_is_still_coming_at_the_end_stays_named"
FREE = f"{ORDER}::test_the_loop_is_free_while_it_is_read_and_written"
WHOLE = f"{ORDER}::test_the_file_is_whole_on_the_disk_before_it_has_its_name"

SERVER_WARM_LIST: Mutants = {
    "warm list: the loop is free while it is read": mutant(
        WARM,
        "await asyncio.to_thread(read_warm_list, self._path)",
        "read_warm_list(self._path)",
        FREE,
    ),
    "warm list: the loop is free while it is written": mutant(
        WARM,
        "await asyncio.to_thread(_replace, self._path, content)",
        "_replace(self._path, content)",
        FREE,
    ),
    "warm list: what happens to adapters wakes it": mutant(
        WARM,
        "may mean that others are there\n        self._changed.set()\n",
        "may mean that others are there\n        pass\n",
        NAMED,
    ),
    "warm list: who is used wakes it": mutant(
        WARM,
        "            del self._used[next(iter(self._used))]\n        self._changed.set()\n",
        "            del self._used[next(iter(self._used))]\n",
        NAMED,
    ),
    "warm list: nobody tells it anything after the end": mutant(
        WARM,
        "        self._unsubscribe()\n",
        "",
        f"{ORDER}::test_nobody_is_told_of_after_the_end",
    ),
    "warm list: the end is heard": mutant(WARM, "        self._ended.set()\n", "", BACK),
    "warm list: the end wakes it": mutant(
        WARM,
        "        self._ended.set()\n        self._changed.set()\n",
        "        self._ended.set()\n",
        f"{ORDER}::test_leaving_one_of_which_nothing_was_asked",
    ),
    "warm list: the end waits for what is written": mutant(
        WARM,
        "        await asyncio.shield(self._task)  # it may be writing\n",
        "",
        LEAVING,
    ),
    "warm list: who leaves it may be cancelled": mutant(
        WARM,
        "        await asyncio.shield(self._task)  # it may be writing\n",
        "        await self._task\n",
        LEAVING,
    ),
    "warm list: the end brings nobody any more": mutant(
        WARM,
        "        if self.restored is not None:\n            self.restored.cancel()\n",
        "",
        COMING,
    ),
    "warm list: who is coming is given up after the last writing": mutant(
        WARM,
        """        await asyncio.shield(self._task)  # it may be writing
        if self.restored is not None:
            self.restored.cancel()
""",
        """        if self.restored is not None:
            self.restored.cancel()
        await asyncio.shield(self._task)
""",
        COMING,
    ),
    "warm list: it waits for a change": mutant(
        WARM,
        "            await self._changed.wait()\n",
        "",
        f"{ORDER}::test_it_looks_when_something_changed",
    ),
    "warm list: a change is one": mutant(
        WARM,
        "            self._changed.clear()\n",
        "",
        f"{ORDER}::test_it_looks_when_something_changed",
    ),
    "warm list: a change while it is written is another one": mutant(
        WARM,
        "            self._changed.clear()\n            await self._write()\n",
        "            await self._write()\n            self._changed.clear()\n",
        WHILE,
    ),
    "warm list: it pauses": mutant(
        WARM,
        "                await asyncio.wait_for(self._ended.wait(), self._pause)\n",
        "                pass\n",
        PAUSES,
    ),
    "warm list: a pause ends": mutant(
        WARM,
        "asyncio.wait_for(self._ended.wait(), self._pause)",
        "self._ended.wait()",
        NAMED,
    ),
    "warm list: the end ends a pause": mutant(
        WARM,
        "asyncio.wait_for(self._ended.wait(), self._pause)",
        "asyncio.sleep(self._pause)",
        PAUSES,
    ),
    "warm list: the end writes what was not": mutant(
        WARM,
        "                await asyncio.wait_for(self._ended.wait(), self._pause)\n        await self._write()\n",
        "                await asyncio.wait_for(self._ended.wait(), self._pause)\n",
        PAUSES,
    ),
    "warm list: what was written is not written again": mutant(
        WARM,
        "            self._written = content\n",
        "            pass\n",
        f"{ORDER}::test_nothing_is_written_where_nothing_changed",
    ),
    "warm list: who is on its way stays named": mutant(
        WARM,
        "set(self._coming) if self.restored and not self.restored.done else set()",
        "set()",
        f"{OF_WARM}::test_who_is_coming_back_stays_named",
    ),
    "warm list: who came back and left is named no more": mutant(
        WARM,
        "set(self._coming) if self.restored and not self.restored.done else set()",
        "set(self._coming)",
        f"{ORDER}::test_who_came_back_and_left_is_named_no_more",
    ),
    "warm list: it is on the disk before it has its name": mutant(
        WARM, "            os.fsync(file.fileno())\n", "", WHOLE
    ),
    "warm list: all of it is on the disk before it has its name": mutant(
        WARM, "            file.flush()\n", "", WHOLE
    ),
    "warm list: it is written before it has its name": mutant(
        WARM,
        '    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")\n',
        "    number, name = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), str(path)\n",
        WHOLE,
    ),
    "warm list: what gets no name is removed": mutant(
        WARM,
        "        os.unlink(name)\n",
        "        pass\n",
        f"{ORDER}::test_a_file_that_gets_no_name_is_removed",
    ),
}
