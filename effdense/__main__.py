"""`python -m effdense`."""

import sys

from effdense.cli import main

sys.exit(main())
