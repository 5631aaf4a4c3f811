"""`python -m lorax_async`: the command line."""

from __future__ import annotations

import sys

from lorax_async.cli import main

sys.exit(main())
