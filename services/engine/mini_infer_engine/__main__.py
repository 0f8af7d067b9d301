"""`python -m mini_infer_engine` is `mini-infer engine`."""

import sys

from mini_infer.cli.main import main

if __name__ == "__main__":
    main(["engine", *sys.argv[1:]])
