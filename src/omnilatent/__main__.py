"""`python -m omnilatent` is the command `omnilatent`."""

import sys

from .cli.main import main

sys.exit(main())
