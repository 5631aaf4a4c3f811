"""All mutants, by the statement that each one makes false."""

from mutants.caches import CACHES
from mutants.copies import GROUPS
from mutants.devices import DEVICES
from mutants.leases import LOADER
from mutants.mutation import Mutants
from mutants.range_downloader import HTTP
from mutants.scheduling import SCHEDULING
from mutants.serving import SERVING
from mutants.sources import SOURCES

MUTANTS: Mutants = DEVICES | GROUPS | CACHES | LOADER | SOURCES | HTTP | SCHEDULING | SERVING
