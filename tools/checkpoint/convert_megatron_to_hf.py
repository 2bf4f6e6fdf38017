"""`fapo convert megatron-to-hf` where users of Megatron look for it; --help lists the options."""

import sys

from megatron_fapo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
