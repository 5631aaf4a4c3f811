"""Every wait and event of the code, by what is lost without it."""

from __future__ import annotations

from ordering.closing import CLOSING
from ordering.files_and_models import FILES_AND_MODELS
from ordering.gpu import GPU
from ordering.holders import HOLDERS
from ordering.host import HOST
from ordering.loader import LOADER
from ordering.mutant import Mutants
from ordering.passage import PASSAGE
from ordering.rules import RULES
from ordering.rules_of_files import RULES_OF_FILES
from ordering.tickets import TICKETS_AND_TABLES

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
}
