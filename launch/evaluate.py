"""The command ``shodh evaluate``."""

from shodh.commands.evaluate import main
from shodh.train.runtime import run_ranks

if __name__ == "__main__":
    run_ranks(main)
