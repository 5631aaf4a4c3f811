"""Rules broken on purpose, one at a time, each with the world in which that is noticed."""

from __future__ import annotations

from core.lifecycle_broken_host import HOST_MEMORY
from core.lifecycle_broken_slots import SLOTS_AND_FILES
from core.lifecycle_broken_unload import PINS_AND_UNLOAD

MUTANTS = SLOTS_AND_FILES | PINS_AND_UNLOAD | HOST_MEMORY
