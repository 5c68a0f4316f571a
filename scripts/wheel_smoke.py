"""Install the wheel that `python -m build` made from the sdist elsewhere, and use it there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path


def main(dist: Path) -> None:
    """Check the newest wheel's content, then run three commands from a bare environment."""
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = Path(__file__).parent.parent / "methods"
    for path in sources.glob("*.py"):
        assert f"effprof/methods/{path.name}" in names, f"{path.name} is not in the wheel"
    strays = [name for name in names if not name.startswith(("effprof/", "effprof-"))]
    assert not strays, f"the wheel would also install {strays}"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        # estimate needs typer and rich only: installing torch again would prove nothing.
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", str(wheel.resolve())], check=True)
        subprocess.run([*pip, "typer>=0.20,<0.29", "rich"], check=True)
        effprof = str(Path(folder) / "bin" / "effprof")
        for arguments in (["--version"], ["--help"], ["methods"], ["gpus", "rtx-4090"]):
            subprocess.run([effprof, *arguments], cwd=folder, check=True, capture_output=True)
        command = [effprof, "estimate", "--model", "1b", "--method", "lowrank", "--json"]
        out = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
        assert json.loads(out)["parameters"]["total"] == 609_310_720
        document, page = Path(folder) / "estimate.json", Path(folder) / "report.html"
        document.write_text(out)
        subprocess.run([effprof, "report", str(document)], cwd=folder, check=True)
        assert "Memory over an update" in page.read_text(encoding="utf-8")
        schema = "import effprof, pathlib; print(pathlib.Path(effprof.__file__).parent / 'schemas')"
        place = subprocess.run(
            [str(python), "-c", schema], cwd=folder, capture_output=True, text=True
        )
        assert (Path(place.stdout.strip()) / "estimate.json").is_file()
    print(f"{wheel.name}: installs and runs outside the repository")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
