"""`python -m mini_infer_gateway` is `mini-infer gateway`."""

import sys

from mini_infer.cli.main import main

if __name__ == "__main__":
    main(["gateway", *sys.argv[1:]])
