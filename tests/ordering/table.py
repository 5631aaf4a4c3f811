"""Every wait and event of the code, by what is lost without it."""

from __future__ import annotations

from ordering.caches import CACHES
from ordering.closing import CLOSING
from ordering.digests import DIGESTS_AND_READERS
from ordering.fetches import FETCHES
from ordering.files_and_models import FILES_AND_MODELS
from ordering.gpu import GPU
from ordering.held_caches import HELD_CACHES
from ordering.holders import HOLDERS
from ordering.host import HOST
from ordering.http import HTTP
from ordering.http_crew import HTTP_CREW
from ordering.http_desk import HTTP_DESK
from ordering.http_wires import HTTP_WIRES
from ordering.hub import HUBS
from ordering.loader import LOADER
from ordering.memory import MEMORY
from ordering.mutant import Mutants
from ordering.opening import OPENINGS
from ordering.passage import PASSAGE
from ordering.remote import REMOTE
from ordering.rules import RULES
from ordering.rules_of_files import RULES_OF_FILES
from ordering.scheduling import SCHEDULING
from ordering.scheduling_guests import SCHEDULING_GUESTS
from ordering.scheduling_queue import SCHEDULING_QUEUE
from ordering.scheduling_slots import SCHEDULING_SLOTS
from ordering.server_calls import SERVER_CALLS
from ordering.server_decoding import SERVER_DECODING
from ordering.server_engine import SERVER_ENGINE
from ordering.server_page import SERVER_PAGE
from ordering.server_requests import SERVER_REQUESTS
from ordering.server_serving import SERVER_SERVING
from ordering.server_warm_list import SERVER_WARM_LIST
from ordering.spans_and_journal import SPANS_AND_JOURNAL
from ordering.tickets import TICKETS_AND_TABLES
from ordering.tracing import TRACING

MUTANTS: Mutants = {
    **GPU,
    **TICKETS_AND_TABLES,
    **HOST,
    **PASSAGE,
    **HOLDERS,
    **LOADER,
    **CLOSING,
    **FILES_AND_MODELS,
    **RULES,
    **RULES_OF_FILES,
    **REMOTE,
    **FETCHES,
    **OPENINGS,
    **HUBS,
    **HTTP,
    **HTTP_CREW,
    **HTTP_DESK,
    **HTTP_WIRES,
    **CACHES,
    **HELD_CACHES,
    **MEMORY,
    **DIGESTS_AND_READERS,
    **SCHEDULING,
    **SCHEDULING_GUESTS,
    **SCHEDULING_QUEUE,
    **SCHEDULING_SLOTS,
    **SERVER_PAGE,
    **SERVER_ENGINE,
    **SERVER_WARM_LIST,
    **SERVER_SERVING,
    **SERVER_CALLS,
    **SERVER_REQUESTS,
    **SERVER_DECODING,
    **TRACING,
    **SPANS_AND_JOURNAL,
}
