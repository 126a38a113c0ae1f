"""Makes ``python -m qhub`` (and so ``accelerate launch -m qhub``) the command line."""

from qhub.cli import main

if __name__ == "__main__":
    main()
