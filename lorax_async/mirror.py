"""Removed in 0.3.0, with the other ways in which replicas took adapters from each other."""

from lorax_async.config import PEERS_REMOVED
from lorax_async.errors import ConfigError

raise ConfigError(PEERS_REMOVED)
