"""The short benchmark of this machine: `run.py` has all of it, the other files a part each."""
