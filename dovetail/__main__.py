"""`python -m dovetail` is the `dovetail` command."""

from dovetail.cli.main import entry

if __name__ == "__main__":
    entry()
