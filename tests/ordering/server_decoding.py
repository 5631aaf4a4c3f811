"""Mutants of the server's parts as a whole, and of what computes its tokens."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

ASSEMBLY = "server/assembly.py"
ANSWER = "server/decoding/answer.py"
STEPS = "server/decoding/steps.py"
KEPT = "server/decoding/kept_keys.py"
DECODER = "server/decoding/transformers_decoder.py"

CLOSED = "server/test_assembled.py::test_all_of_it_is_closed"
OF_ANSWERS = "server/decoding/test_answers.py"
BY_THE_END = f"{OF_ANSWERS}::test_who_waits_is_woken_by_the_end"
BY_CANCELLING = f"{OF_ANSWERS}::test_who_waits_is_woken_by_cancelling_it"
OF_KEPT = "server/decoding/test_kept_keys.py"
FREE_PLACES = f"{OF_KEPT}::test_nothing_is_left_at_a_place_that_is_free"
GATE = "server/decoding/test_decoder_gate.py"
BUDGETS = f"{GATE}::test_what_one_pass_has_waited_is_missing_for_the_next"

SERVER_DECODING: Mutants = {
    "assembly: a loader is closed": mutant(
        ASSEMBLY,
        """        loader = await stack.enter_async_context(
            AdapterLoader(layouts.from_module(base.model), config)
        )
""",
        """        loader = await AdapterLoader(layouts.from_module(base.model), config).__aenter__()
""",
        CLOSED,
    ),
    "assembly: a base is let go of": mutant(
        ASSEMBLY,
        "stack.enter_context(attach(base.model, loader))",
        "attach(base.model, loader).__enter__()",
        CLOSED,
    ),
    "assembly: a scheduler is closed": mutant(
        ASSEMBLY,
        """        scheduler = await stack.enter_async_context(
            AdapterScheduler(loader, max_begun=capacity.sequences, max_share=capacity.share)
        )
""",
        """        scheduler = AdapterScheduler(loader, max_begun=capacity.sequences, max_share=capacity.share)
""",
        CLOSED,
    ),
    "assembly: an engine is closed": mutant(
        ASSEMBLY,
        """        engine = await stack.enter_async_context(
            Engine(
                scheduler,
                decoder,
                max_tokens=capacity.step_tokens,
                max_sequences=capacity.sequences,
            )
        )
""",
        """        engine = await Engine(
            scheduler,
            decoder,
            max_tokens=capacity.step_tokens,
            max_sequences=capacity.sequences,
        ).__aenter__()
""",
        CLOSED,
    ),
    "assembly: a warm list is closed": mutant(
        ASSEMBLY,
        "(await stack.enter_async_context(warm_list)).used",
        "(await warm_list.__aenter__()).used",
        CLOSED,
    ),
    "assembly: a warm list is closed while its loader is open": mutant(
        ASSEMBLY,
        """            noted.used = (await stack.enter_async_context(warm_list)).used
        yield Service(settings, noted, loader, base.tokenizer, base.stop_tokens)
""",
        """            noted.used = (await warm_list.__aenter__()).used
        yield Service(settings, noted, loader, base.tokenizer, base.stop_tokens)
    if warm is not None:
        await warm_list.__aexit__(None, None, None)
""",
        CLOSED,
    ),
    "assembly: who is refused is not noted": mutant(
        ASSEMBLY,
        """        tokens = self._engine.submit(generation)
        if generation.adapter is not None:
            self.used(generation.adapter)
        return tokens
""",
        """        if generation.adapter is not None:
            self.used(generation.adapter)
        return self._engine.submit(generation)
""",
        "server/test_assembled.py::test_who_is_refused_is_not_noted",
    ),
    "assembly: what a base says is said again": mutant(
        ASSEMBLY,
        """    finally:
        logging.set_verbosity(said)
        if shown:
            logging.enable_progress_bar()
""",
        """    except ImportWarning:
        raise
    logging.set_verbosity(said)
    if shown:
        logging.enable_progress_bar()
""",
        "server/test_assembled.py::test_what_is_told_of_a_base_is_told_again_after_it",
    ),
    "answers: a reader waits": mutant(ANSWER, "            await self._wake\n", "", BY_CANCELLING),
    "answers: a token wakes its reader": mutant(
        ANSWER,
        "        self._coming.append(token)\n        self._tell()\n",
        "        self._coming.append(token)\n",
        f"{OF_ANSWERS}::test_who_waits_is_woken_by_a_token",
    ),
    "answers: a token is there before it wakes its reader": mutant(
        ANSWER,
        "        while not self._coming:\n            if",
        "        if not self._coming:\n            if",
        BY_THE_END,
    ),
    "answers: the end wakes a reader": mutant(
        ANSWER,
        "            self._error = error\n            self._tell()\n",
        "            self._error = error\n",
        BY_THE_END,
    ),
    "answers: the first end counts": mutant(
        ANSWER,
        "        if not self._ended:\n            self._ended = True\n",
        "        if True:\n            self._ended = True\n",
        f"{OF_ANSWERS}::test_its_tokens_come_before_its_error_and_its_first_end_counts",
    ),
    "answers: who cancels has nothing computed": mutant(
        ANSWER, "        self.ticket.cancel()\n", "", BY_CANCELLING
    ),
    "answers: who cancels wakes the reader": mutant(
        ANSWER,
        "        self.ticket.cancel()\n        self.end()\n",
        "        self.ticket.cancel()\n",
        BY_CANCELLING,
    ),
    "answers: a reader that has gone is not woken": mutant(
        ANSWER,
        "        if wake is not None and not wake.done():\n",
        "        if wake is not None:\n",
        f"{OF_ANSWERS}::test_a_reader_that_was_cancelled_loses_nothing",
    ),
    "steps: who has gone leaves its place before others begin": mutant(
        STEPS,
        """            for number in gone:
                decoder.forget(number)
            return self._chosen(decoder.compute(self.step))
""",
        """            found = self._chosen(decoder.compute(self.step))
            for number in gone:
                decoder.forget(number)
            return found
""",
        "server/test_engine_ends.py::test_who_has_gone_has_left_its_place_before_another_takes_it",
    ),
    "keys: what does not follow is refused before anything changes": mutant(
        KEPT,
        """        self._check(sequences, starts)
        for sequence, start in zip(sequences, starts, strict=True):
            if start == 0:
                self.forget(sequence)
                self._take(sequence)
            self._lengths[sequence] = start + tokens
""",
        """        for sequence, start in zip(sequences, starts, strict=True):
            if start == 0:
                self.forget(sequence)
                self._take(sequence)
        self._check(sequences, starts)
        for sequence, start in zip(sequences, starts, strict=True):
            self._lengths[sequence] = start + tokens
""",
        f"{OF_KEPT}::test_what_does_not_follow_changes_nothing",
    ),
    "keys: who begins anew has nothing": mutant(
        KEPT, "                self.forget(sequence)\n", "", FREE_PLACES
    ),
    "keys: who is forgotten leaves nothing": mutant(
        KEPT, "                layer.clear(place, length)\n", "                pass\n", FREE_PLACES
    ),
    "keys: who is moved leaves nothing": mutant(
        KEPT, "            kept[len(places) :] = 0\n", "", FREE_PLACES
    ),
    "decoder: a pass waits for what is left of a step's budget": mutant(
        DECODER, "            left = max(0.0, gate.left)\n", "", BUDGETS
    ),
    "decoder: who waits is computed last": mutant(
        DECODER, "sorted(found.values(), key=waits)", "list(found.values())", BUDGETS
    ),
    "decoder: others of a step need not wait": mutant(
        DECODER,
        ", step.others_wait, beside=beside) as gate",
        ", step.others_wait) as gate",
        f"{GATE}::test_a_prompt_alone_in_its_pass_is_not_alone_in_its_step",
    ),
    "decoder: who is out of a step is forgotten": mutant(
        DECODER,
        "        for number in out:\n            self.forget(step.parts[number].sequence)\n",
        "",
        f"{GATE}::test_rows_that_are_late_begin_again_and_the_others_go_on",
    ),
}
