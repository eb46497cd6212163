"""Install programs of others that are tried against our servers, for tests of the matrix; `make test-all` calls this.

Each gets an environment of its own inside the one this runs in, because their requirements exclude ours.
"""

import subprocess
import sys
from pathlib import Path

CLIENTS = {"litellm": "litellm[proxy]==1.108.7", "lm_eval": "lm_eval[api]==0.4.13"}


def find_client(name: str) -> Path:
    """The program of one of CLIENTS, installed or not."""
    return Path(sys.prefix, "clients", name, "bin", name)


if __name__ == "__main__":
    for client, requirement in CLIENTS.items():
        folder = find_client(client).parents[1]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, requirement], check=True)
