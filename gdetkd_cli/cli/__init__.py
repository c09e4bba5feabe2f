"""The command line: a command parses, calls one ``run_*``, and renders what it returns.

Only typer is imported at the top of ``app``, ``options`` and the commands; everything else inside the bodies, so that
``gdetkd --help`` answers at once.
"""
