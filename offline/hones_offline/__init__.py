"""Attribution, learning and evaluation of steering profiles (the HONES method, arXiv 2604.17941)."""
