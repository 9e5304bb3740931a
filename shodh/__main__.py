"""``python -m shodh``: the console command."""

from shodh.commands import main

if __name__ == "__main__":
    main()
