"""The command ``shodh tokenizer``."""

from shodh.commands.tokenizer import main
from shodh.train.runtime import run_ranks

if __name__ == "__main__":
    run_ranks(main)
