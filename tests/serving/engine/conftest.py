"""These tests import vLLM: collected in the processes that `../test_in_vllm.py` starts for them, nowhere else."""

import os
import sys

from serving.engines import ENVIRONMENT, TORCHVISION

IN_A_PROCESS_FOR_IT = str(TORCHVISION) in sys.path
collect_ignore_glob = [] if IN_A_PROCESS_FOR_IT else ["test_*.py"]
if IN_A_PROCESS_FOR_IT:
    os.environ.update(ENVIRONMENT)
