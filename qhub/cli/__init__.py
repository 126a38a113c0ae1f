"""The command line ``qhub``: one file a command.

app.py       the application: built-in commands, those of plugins, errors and exit codes
output.py    results as tables or as JSON on stdout, everything else on stderr
loading.py   models, tokenizers and configs for commands that take a MODEL
measure.py   what a quantized model holds: layouts, bits per weight, shares
list_.py doctor.py quantize.py inspect_.py eval_.py explain.py new_plugin.py   the commands
checks.py    what `qhub doctor` checks

Exit codes: 0 done, 1 it failed or what it found is negative, 2 the command was used wrongly.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line; the entry point of the script ``qhub``."""
    from qhub.cli.app import app

    app()
