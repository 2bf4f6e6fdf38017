"""`fapo convert hf-to-megatron` where users of Megatron look for it; --help lists the options."""

import sys

from megatron_fapo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
