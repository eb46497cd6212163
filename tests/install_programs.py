"""See to it that there are a browser and nginx, which some tests run; `make test` calls this.

What is installed already is taken as it is. Else Debian's or Ubuntu's packages are installed, which needs root.
"""

import os
import shutil
import subprocess
import sys

from browser import NAMES, find_chromium
from nginx import find_nginx

if __name__ == "__main__":
    missing = {"chromium": find_chromium(), "nginx-light": find_nginx()}
    packages = [package for package, found in missing.items() if not found]
    if packages and (os.geteuid() != 0 or not shutil.which("apt-get")):
        sys.exit(
            f"some tests look at pages in a browser ({', '.join(NAMES)}) and run nginx; install what is missing here: "
            f"{', '.join(packages)}"
        )
    if packages:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "--quiet"], check=True, env=quiet)
        subprocess.run(["apt-get", "install", "--quiet", "--yes", *packages], check=True, env=quiet)
