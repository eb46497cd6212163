"""``python -m hones_steer ...`` is ``hones ...``."""

import sys

from hones_steer.cli import main

sys.exit(main())
