"""`python -m oomproof`: the command line where no script is on the path."""

from oomproof.cli.main import main

if __name__ == "__main__":
    main()
