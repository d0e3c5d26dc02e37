"""Runs the command line with `python -m coalign`, or on several devices with `torchrun -m coalign`."""

from coalign.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
