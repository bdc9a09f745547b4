"""`python -m pjv2.cli`, for where the `pjv2` script is not on the path."""

import sys

from pjv2.cli import main

sys.exit(main())
