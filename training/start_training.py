"""Train a model: the same as `apt-model train`, with the same options.

python training/start_training.py --preset tiny --out runs/tiny
"""

import sys

from apt_model.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
