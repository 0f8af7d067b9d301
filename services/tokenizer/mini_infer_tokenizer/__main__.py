"""`python -m mini_infer_tokenizer` is `mini-infer tokenizer`."""

import sys

from mini_infer.cli.main import main

if __name__ == "__main__":
    main(["tokenizer", *sys.argv[1:]])
