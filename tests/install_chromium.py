"""See to it that there is a browser for the tests of pages; `make test` calls this.

An installed Chromium or Chrome is taken as it is. Else Debian's or Ubuntu's package is installed, which needs root.
"""

import os
import shutil
import subprocess
import sys

from browser import NAMES, find_chromium

if __name__ == "__main__" and not find_chromium():
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(f"the tests look at pages in a browser, and none of {', '.join(NAMES)} is installed; install Chromium")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "--quiet"], check=True, env=quiet)
    subprocess.run(["apt-get", "install", "--quiet", "--yes", "chromium"], check=True, env=quiet)
