"""Forward passes and the server: what is kept during a pass, freed after it, and written."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from lorax_async.engines.batch import ModelBatch
from lorax_async.handle import AdapterHandle
from lorax_async.server import adapter_tokenizers, engine, warm_list
from lorax_async.server.engine import Engine
from lorax_async.server.service import InFlightRequests, RequestScope
from lorax_async.server.transformers_decoder import KVCache, PlacesLayer
from mutants.mutation import (
    Mutants,
    NoLock,
    initialized,
    mutant,
    nothing,
    nothing_awaited,
    same,
    seen_by,
    skipped,
)

THREADS = "engines/test_attach.py"
ENGINE = "server/test_engine.py"
DECODER = "server/test_decoder.py"
WARM = "server/test_warm_list.py"
TOKENIZERS = "server/test_adapter_tokenizers.py"


def _only_told(self: Engine) -> list[int]:
    ended, self._ended_sequences = self._ended_sequences, []
    return ended


SERVING: Mutants = {
    "batch: adapters are in use while it is computed": mutant(
        f"{THREADS}::test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter",
        (AdapterHandle, "use", lambda *_: nullcontext())),
    "batch: layers begin and end one after the other": mutant(
        "engines/test_engine_locks.py::test_two_layers_that_end_at_once_are_both_over",
        initialized(ModelBatch, _lock=NoLock)),
    "gate: a pass waits for a layer that is on its way": mutant(
        "engines/test_layer_gate.py::test_a_layer_within_the_budget_is_waited_for",
        skipped(AdapterHandle, "wait_layer")),
    "engine: close waits for the step that is computed": mutant(
        f"{ENGINE}::test_closing_fails_the_rest_after_the_step_that_is_computed",
        (engine, "ThreadPoolExecutor", lambda _, name: ThreadPoolExecutor(2, name))),
    "engine: a sequence leaves its place before another takes it": mutant(
        f"{ENGINE}::test_an_answer_cancelled_at_any_time_disturbs_none",
        (Engine, "_take_ended", _only_told)),
    "engine: an ended sequence is freed": mutant(
        f"{ENGINE}::test_an_answer_cancelled_at_any_time_disturbs_none",
        skipped(Engine, "_take_ended", ())),
    "engine: a prompt is in the vocabulary of its adapter": mutant(
        f"{TOKENIZERS}::test_answers_are_pefts_with_the_adapter_s_tokenizer",
        skipped(engine, "_vocabulary_error")),
    "server: an adapter's own tokenizer is there, and of bounded size": mutant(
        f"{TOKENIZERS}::test_a_tokenizer_that_cannot_be_read_is_a_typed_error",
        skipped(adapter_tokenizers, "require_file")),
    "keys: a free place holds nothing": mutant(
        f"{DECODER}::test_what_was_at_a_place_never_matters", skipped(PlacesLayer, "clear")),
    "keys: what does not follow changes nothing": mutant(
        f"{DECODER}::test_steps_that_do_not_follow_change_nothing", skipped(KVCache, "_check")),
    "server: in-flight requests are counted": mutant(
        "server/test_connections.py::test_a_signal_drains",
        (InFlightRequests, "count_request", lambda _: nullcontext())),
    "server: a client that hangs up frees its place": mutant(
        "server/test_connections.py::test_a_client_that_hangs_up_frees_its_place",
        (RequestScope, "_listen", nothing_awaited)),
    "warm list: it is on the disk before it has its name": mutant(
        f"{WARM}::test_the_file_is_whole_on_disk_before_its_name",
        seen_by(warm_list, "os", fsync=nothing)),
    "warm list: it is replaced as a whole": mutant(
        f"{WARM}::test_the_file_is_whole_on_disk_before_its_name",
        (warm_list, "_replace", Path.write_bytes)),
    "warm list: leaving waits for what is written": mutant(
        f"{WARM}::test_leaving_is_cancelled_but_not_a_write",
        seen_by(warm_list, "asyncio", shield=same)),
}  # fmt: skip
