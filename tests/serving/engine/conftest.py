"""These tests import vLLM: collected in the processes that `test_in_vllm.py` starts for them, nowhere else."""

import os

collect_ignore_glob = [] if os.environ.get("HONES_TEST_ENGINE") else ["test_*.py"]
