"""`python -m uniflow` is the command `uniflow`."""

from uniflow.cli import main

if __name__ == "__main__":
    main()
