"""`python -m arctrm` is the `arctrm` command."""

from arctrm.cli import main

if __name__ == "__main__":
    main()
