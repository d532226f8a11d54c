"""Entry point of `python -m pipeline`, which is `bld`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
