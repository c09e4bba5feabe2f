"""``python -m gdetkd_cli`` is ``gdetkd``."""

from gdetkd_cli.cli.app import main

if __name__ == "__main__":
    main()
