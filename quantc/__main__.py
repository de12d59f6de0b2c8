"""`python -m quantc`: the command line, as processes that `torchrun -m` starts need it."""

from .cli import main

if __name__ == "__main__":
    main()
