"""``python -m popi`` is ``popi``."""

import sys

from popi.cli import main

sys.exit(main())
