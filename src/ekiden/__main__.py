"""`python -m ekiden` is the `ekiden` command; so `torchrun -m ekiden` and `accelerate launch -m ekiden` work."""

from ekiden.cli import main

if __name__ == "__main__":
    main()
