"""The command ``shodh ccm``."""

from shodh.commands.ccm import main
from shodh.train.runtime import run_ranks

if __name__ == "__main__":
    run_ranks(main)
