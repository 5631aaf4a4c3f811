"""Mutants of what surrounds requests: bodies, clients, the operator's calls, numbers."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

BODIES = "server/calls/bodies.py"
CLIENTS = "server/calls/clients.py"
ADMIN = "server/calls/admin.py"
METRICS = "server/calls/metrics.py"
APP = "server/calls/app.py"
PROMPTS = "server/calls/prompts.py"

OF_CLIENTS = "server/calls/test_server_clients.py"
OF_BODIES = "server/calls/test_server_bodies.py"
OF_ADMIN = "server/calls/test_server_admin.py"
OF_METRICS = "server/calls/test_server_metrics.py"
ORDER = "server/calls/test_server_admin_order.py"
MANY = "server/calls/test_server_limits.py::test_a_client_has_so_many_adapters_under_way"
WAITS = f"{OF_CLIENTS}::test_who_waits_with_a_large_body_sends_none"
THROWN = f"{OF_BODIES}::test_the_answer_is_out_before_the_rest_is_thrown_away"
UNDER_WAY = f"{ORDER}::test_a_load_is_under_way"
LOADED = f"{OF_ADMIN}::test_load_use_and_unload"
IN_USE = f"{OF_ADMIN}::test_what_is_in_use_is_unloaded_later"
COUNTED = f"{OF_METRICS}::test_what_waits_and_runs_is_told_as_vllm_does"

SERVER_REQUESTS: Mutants = {
    "bodies: what is announced too large is not waited for": mutant(
        BODIES,
        "    if said.isdigit() and int(said) > most:\n        raise _too_large(most)\n",
        "",
        WAITS,
    ),
    "bodies: what becomes too large is not waited for": mutant(
        BODIES,
        "                if len(body) + len(chunk) > most:\n"
        "                    raise _too_large(most)\n",
        "",
        f"{OF_CLIENTS}::test_a_body_that_is_too_large",
    ),
    "bodies: one has its time": mutant(
        BODIES,
        "async with asyncio.timeout(seconds), aclosing(_chunks(request.receive)) as chunks:",
        "async with aclosing(_chunks(request.receive)) as chunks:",
        f"{OF_CLIENTS}::test_a_body_that_does_not_come",
    ),
    "bodies: one that is broken off is let go of": mutant(
        BODIES,
        "async with asyncio.timeout(seconds), aclosing(_chunks(request.receive)) as chunks:\n"
        "            async for chunk in chunks:",
        "async with asyncio.timeout(seconds):\n"
        "            async for chunk in _chunks(request.receive):",
        f"{OF_BODIES}::test_a_body_is_let_go_of_where_it_is_too_large",
    ),
    "bodies: who hangs up has sent none": mutant(
        BODIES,
        "            raise ClientGone\n",
        "            return\n",
        f"{OF_BODIES}::test_who_hangs_up_has_sent_no_body",
    ),
    "bodies: an answer comes before the rest is thrown away": mutant(
        BODIES,
        'message | {"more_body": True} if message["type"] == _BODY else message',
        "message",
        THROWN,
    ),
    "bodies: the rest is thrown away": mutant(
        BODIES,
        "            async for chunk in chunks:\n                left",
        '            for chunk in [b""]:\n                left',
        THROWN,
    ),
    "bodies: the rest is thrown away up to a limit": mutant(
        BODIES,
        "                if left < 0:\n                    break\n",
        "",
        f"{OF_CLIENTS}::test_an_endless_body_ends",
    ),
    "bodies: the rest has its time": mutant(
        BODIES,
        "async with asyncio.timeout(seconds), aclosing(_chunks(receive)) as chunks:",
        "async with aclosing(_chunks(receive)) as chunks:",
        WAITS,
    ),
    "bodies: the rest is let go of": mutant(
        BODIES,
        "async with asyncio.timeout(seconds), aclosing(_chunks(receive)) as chunks:\n"
        "            async for chunk in chunks:",
        "async with asyncio.timeout(seconds):\n            async for chunk in _chunks(receive):",
        THROWN,
    ),
    "bodies: an answer ends": mutant(
        BODIES,
        '    await send({"type": _BODY, "body": b"", "more_body": False})\n',
        "",
        THROWN,
    ),
    "app: what was not read is thrown away before a connection is closed": mutant(
        APP,
        "        return Unread(refusal, settings.slow_client) if refusal.close else refusal.response()\n",
        "        return refusal.response()\n",
        f"{OF_CLIENTS}::test_a_body_that_is_too_large",
    ),
    "app: nobody is told who has hung up": mutant(
        APP,
        "            ClientGone: _tell_nobody,\n",
        "",
        f"{OF_BODIES}::test_nobody_complains_of_who_hangs_up",
    ),
    "prompts: others go on while one is read": mutant(
        PROMPTS,
        "        (found,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)\n",
        "        found = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)\n",
        "server/calls/test_server_long_bodies.py::test_others_go_on_while_a_long_text_becomes_tokens",
    ),
    "clients: an adapter is under way until it has answered": mutant(
        CLIENTS, "        using[ref] += 1\n", "", MANY
    ),
    "clients: who has answered makes room": mutant(
        CLIENTS, "                del using[ref]\n", "                pass\n", MANY
    ),
    "clients: who has nothing under way is not kept": mutant(
        CLIENTS,
        "                self._using.pop(client, None)\n",
        "                pass\n",
        f"{OF_CLIENTS}::test_a_cancelled_server_frees_all_places",
    ),
    "clients: however it ends it makes room": mutant(
        CLIENTS,
        """        try:
            yield
        finally:
            using[ref] -= 1
            if not using[ref]:
                del using[ref]
            if not using:
                self._using.pop(client, None)
""",
        """        yield
        using[ref] -= 1
        if not using[ref]:
            del using[ref]
        if not using:
            self._using.pop(client, None)
""",
        f"{OF_CLIENTS}::test_a_cancelled_server_frees_all_places",
    ),
    "admin: a load is under way": mutant(
        ADMIN,
        "        with self._service.under_way.one():\n"
        "            body = await self._body(request, LoadBody)\n",
        "        if True:\n            body = await self._body(request, LoadBody)\n",
        UNDER_WAY,
    ),
    "admin: an unload is under way": mutant(
        ADMIN,
        "        with self._service.under_way.one():\n"
        "            body = await self._body(request, UnloadBody)\n",
        "        if True:\n            body = await self._body(request, UnloadBody)\n",
        UNDER_WAY,
    ),
    "admin: a name is free before anything is loaded": mutant(
        ADMIN,
        "            self._require_free(body)\n            adapter = await",
        "            adapter = await",
        f"{ORDER}::test_for_a_name_that_is_taken_nothing_is_loaded",
    ),
    "admin: a name is free once its adapter is loaded": mutant(
        ADMIN,
        "            self._require_free(body)\n            self._service.names.put",
        "            self._service.names.put",
        f"{ORDER}::test_of_two_loads_of_one_name_the_first_counts",
    ),
    "admin: a name stands for what was loaded": mutant(
        ADMIN,
        """            (await self._service.loader.load(adapter)).release()
            self._require_free(body)
            self._service.names.put(body.lora_name, adapter)
""",
        """            self._require_free(body)
            self._service.names.put(body.lora_name, adapter)
            (await self._service.loader.load(adapter)).release()
""",
        f"{OF_ADMIN}::test_a_malformed_folder_is_told",
        f"{OF_ADMIN}::test_what_cannot_be_loaded",
    ),
    "admin: what was loaded is nobody's": mutant(
        ADMIN,
        "            (await self._service.loader.load(adapter)).release()\n",
        "            self.held = await self._service.loader.load(adapter)\n",
        LOADED,
    ),
    "admin: the loop is free while a folder is looked for": mutant(
        ADMIN,
        "await asyncio.to_thread(_adapter_at, body.lora_path)",
        "_adapter_at(body.lora_path)",
        f"{ORDER}::test_the_loop_is_free",
    ),
    "admin: the loop is free while adapters are listed": mutant(
        ADMIN,
        "await asyncio.to_thread(_listed, found)",
        "_listed(found)",
        f"{ORDER}::test_the_loop_is_free",
    ),
    "admin: an unload waits until its memory is free": mutant(
        ADMIN, "            await self._let_go(adapter)\n", "", LOADED
    ),
    "admin: an unload does not wait for ever": mutant(
        ADMIN, "timeout=UNLOAD_SECONDS", "timeout=None", IN_USE
    ),
    "admin: what has another name stays": mutant(
        ADMIN,
        "        if adapter in self._service.names.adapters.values():\n            return\n",
        "",
        f"{OF_ADMIN}::test_a_folder_with_two_names_stays_for_the_other",
    ),
    "server metrics: who has ended waits and runs no more": mutant(
        METRICS,
        "        except BaseException:\n            self._move(None)\n",
        "        except BaseException:\n",
        f"{ORDER}::test_who_has_ended_runs_no_more",
    ),
    "server metrics: who is cancelled runs no more": mutant(
        METRICS,
        "    def cancel(self) -> None:\n        self._move(None)\n",
        "    def cancel(self) -> None:\n",
        f"{ORDER}::test_who_has_its_stop_string_runs_no_more",
    ),
    "server metrics: who was cancelled does not run": mutant(
        METRICS,
        "        if not self._begun and self._in is not None:\n",
        "        if not self._begun:\n",
        f"{ORDER}::test_who_was_cancelled_before_its_first_token_never_runs",
    ),
    "server metrics: who has a token waits no more": mutant(
        METRICS,
        "            self._move(metrics.sequences.running)\n",
        "            pass\n",
        COUNTED,
    ),
    "server metrics: what fails is counted": mutant(
        METRICS,
        "        finally:\n            self._metrics.requests",
        "        else:\n            self._metrics.requests",
        f"{OF_METRICS}::test_a_fault_is_a_500",
    ),
    "server metrics: looks at the loop end": mutant(
        METRICS,
        "        self._loader.close()\n",
        "        pass\n",
        f"{OF_METRICS}::test_looks_at_the_loop_end_with_the_server",
    ),
}
