"""`python -m lowrank_tune` is `lowrank-tune`."""

from lowrank_tune.cli import main

if __name__ == "__main__":
    main()
