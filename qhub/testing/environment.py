"""Makes a fresh virtual environment that sees this one's packages: a plugin is tried there as its users install it.

Nothing is downloaded. Packages are shown through links, so that some can be hidden.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["FreshEnvironment"]


class FreshEnvironment:
    """Is a virtual environment in ``folder`` (made new) with the running environment's packages.

    ``without``: names of distributions that it does not see; names that are not installed are ignored.
    """

    def __init__(self, folder: Path, without: Iterable[str] = ()) -> None:
        venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        self.folder = folder
        self.python = Path(paths["scripts"]) / Path(sys.executable).name
        hidden = {name for one in without for name in _top_level(one)}
        running = sysconfig.get_paths()
        lines = []
        for index, source in enumerate(dict.fromkeys([running["purelib"], running["platlib"]])):
            seen = folder / f"seen-{index}"
            seen.mkdir()
            for entry in Path(source).iterdir():
                if entry.name not in hidden and entry.name != "__pycache__":
                    (seen / entry.name).symlink_to(entry)
            # Not the bare path: the .pth files in it, of editable installs, must be read too.
            lines.append(f"import site; site.addsitedir({str(seen)!r})\n")
        (Path(paths["purelib"]) / "seen.pth").write_text("".join(lines), encoding="utf-8")

    def install(self, project: Path) -> None:
        """Install the project folder with pip, without its dependencies and without the network.

        Raises :class:`subprocess.CalledProcessError` with pip's output when that fails.
        """
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "--disable-pip-version-check",
            "install",
            "-q",
        ]
        self._run([*pip, "--no-index", "--no-deps", "--no-build-isolation", str(project)], self.folder, {})

    def run(self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run the environment's Python with ``arguments`` and return what it prints.

        ``cwd``: None for the environment's folder. ``env``: variables besides the present ones. Raises
        :class:`subprocess.CalledProcessError` with its output when it fails.
        """
        return self._run([str(self.python), *arguments], cwd or self.folder, env or {})

    @staticmethod
    def _run(command: list[str], cwd: Path, env: Mapping[str, str]) -> str:
        # What the running tests put on the path is not what a user has.
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(command, cwd=cwd, env={**variables, **env}, capture_output=True, text=True, check=False)
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            error.add_note(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
            raise error
        return done.stdout


def _top_level(name: str) -> set[str]:
    """Return the entries of site-packages that belong to the distribution ``name``."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return set()
    return {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
