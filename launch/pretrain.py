"""The command ``shodh pretrain``."""

from shodh.commands import run_command

if __name__ == "__main__":
    run_command("pretrain")
