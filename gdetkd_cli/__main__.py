"""Runs ``gdetkd`` as ``python -m gdetkd_cli``."""

from gdetkd_cli.cli.app import main

if __name__ == "__main__":
    main()
