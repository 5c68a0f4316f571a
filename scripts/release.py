"""The release checklist: each line is checked, and what is left to a person is printed at the end.

python scripts/release.py            about a minute; exits 1 while anything is missing
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
MINORS = (11, 12, 13)  # of the Pythons that are promised
QUIET = {"DISABLE_MKDOCS_2_WARNING": "true", "NO_MKDOCS_2_WARNING": "1"}
WHEEL_MIB = 2


def run(*command: str) -> str:
    """What a command says; raises AssertionError with it where the command fails."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **QUIET}, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-2000:]}"
    return done.stdout + done.stderr


def version() -> str:
    """The one in pyproject.toml, which every other place has to name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def tree_is_clean() -> str:
    changed = run("git", "status", "--short")
    assert not changed, f"not committed:\n{changed}"
    return run("git", "log", "-1", "--format=%h %s").strip()


def version_is_everywhere() -> str:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version()}\n" in citation, f"CITATION.cff does not say {version()}"
    return version()


def changelog_has_it() -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert version() in heads, f"no section [{version()}]; there is {', '.join(heads)}"
    unreleased = text.partition("## [Unreleased]")[2].partition("\n## ")[0].strip()
    assert not unreleased, "[Unreleased] still has entries: move them"
    return f"[{version()}]"


def generated_is_fresh() -> str:
    return run(sys.executable, "scripts/generate.py", "--check").strip()


def documentation_builds() -> str:
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder)
        return f"{sum(1 for _ in Path(folder).rglob('*.html'))} pages, no broken link"


def build_is_clean(dist: Path) -> str:
    said = run(sys.executable, "-m", "build", "--outdir", str(dist))
    warned = [line for line in said.splitlines() if "warning" in line.lower()]
    warned = [line for line in warned if "byte-compiling is disabled" not in line]  # asked for
    assert not warned, said[-2000:]
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {"effprof/report/report.js", "effprof/schemas/estimate.json", "effprof/py.typed"}
    assert wanted <= set(names), f"not in the wheel: {wanted - set(names)}"
    assert any(name.endswith("licenses/LICENSE") for name in names), "no licence in the wheel"
    size = wheel.stat().st_size / 2**20
    assert size < WHEEL_MIB, f"the wheel has {size:.1f} MiB"
    return f"{len(names)} files, {size:.2f} MiB"


def wheel_runs(dist: Path) -> str:
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = []
    for minor in MINORS:
        named = shutil.which(f"python3.{minor}")
        places = [*([named] if named else []), *pyenv.glob(f"versions/3.{minor}.*/bin/python")]
        works = (p for p in places if not subprocess.run([p, "-V"], capture_output=True).returncode)
        python = next(works, None)
        if python:
            run(str(python), "scripts/wheel_smoke.py", str(dist))
            found.append(f"3.{minor}")
    assert found, "none of these Pythons is here"
    return f"under {', '.join(found)}"


def main() -> int:
    """Go through the list."""
    missing = 0
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder)
        checks: dict[str, Callable[[], str]] = {
            "the tree is clean": tree_is_clean,
            "one version": version_is_everywhere,
            "the changelog": changelog_has_it,
            "help snapshots": generated_is_fresh,
            "documentation": documentation_builds,
            "sdist and wheel": lambda: build_is_clean(dist),
            "the wheel runs": lambda: wheel_runs(dist),
        }
        for name, check in checks.items():
            try:
                print(f"ok       {name}: {check()}", flush=True)
            except AssertionError as problem:
                missing += 1
                print(f"MISSING  {name}: {problem}", flush=True)
    if missing:
        return 1
    print(f"Left to you: .ci/run; git tag v{version()}; git push --tags; upload dist/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
