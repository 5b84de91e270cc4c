"""`python -m smartfrz` is the same as `smartfrz`."""

from smartfrz.cli import main

if __name__ == "__main__":
    main()
