"""The command ``shodh finetune``."""

from shodh.commands.finetune import main
from shodh.train.runtime import run_ranks

if __name__ == "__main__":
    run_ranks(main)
