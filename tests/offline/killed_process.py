"""`hones` in a process that kills itself: `torchrun killed_process.py RANK FILES attribute ...`.

The process of that rank gets SIGKILL when it has written so many files.
"""

import os
import sys

from offline.several_processes import kill_after

from hones_steer.cli import main

rank, files, *arguments = sys.argv[1:]
if os.environ["RANK"] == rank:
    kill_after(int(files))
sys.exit(main(arguments))
