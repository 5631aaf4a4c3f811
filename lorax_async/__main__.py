"""`python -m lorax_async`: the command line."""

import sys

from lorax_async.cli import main

sys.exit(main())
