"""The command line: a command parses, calls one ``run_*``, and renders what it returns.

``app``, ``options`` and the command modules import only typer at the top and everything else inside function bodies:
``gdetkd --help`` must be fast.
"""
