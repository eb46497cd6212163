"""Install programs of others that are tried against our servers, for tests of the matrix; `make test-all` calls this.

Each gets an environment of its own inside the one this runs in, because their requirements exclude ours.
"""

import subprocess
import sys
from pathlib import Path

CLIENTS = {
    "litellm": "litellm[proxy]==1.108.7",
    "lm_eval": "lm_eval[api]==0.4.13",
    "langchain": "langchain-openai==1.7.4",
}


def find_client(name: str, program: str) -> Path:
    """A program of the environment of one of CLIENTS, installed or not."""
    return Path(sys.prefix, "clients", name, "bin", program)


if __name__ == "__main__":
    for client, requirement in CLIENTS.items():
        python = find_client(client, "python")
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, requirement], check=True)
