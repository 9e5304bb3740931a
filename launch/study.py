"""The command ``shodh study``."""

from shodh.commands.study import main
from shodh.train.runtime import run_ranks

if __name__ == "__main__":
    run_ranks(main)
