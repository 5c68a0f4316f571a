"""The release checklist: each line is checked, and what is left to a person is printed at the end.

python scripts/release.py --cut         moves [Unreleased] of CHANGELOG.md under the version
python scripts/release.py               goes through the list; exits 1 while anything is missing
python scripts/release.py --skip-tests  the same where the tests passed elsewhere; it says so
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHANGELOG, DIST = ROOT / "CHANGELOG.md", ROOT / "dist"
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
    text = CHANGELOG.read_text(encoding="utf-8")
    assert version() in sections(text), f"no section [{version()}]; --cut moves [Unreleased] there"
    assert not unreleased(text), f"[Unreleased] has entries beside [{version()}]: move them by hand"
    dated = re.search(rf"^## \[{re.escape(version())}\] - (\d{{4}}-\d\d-\d\d)$", text, re.MULTILINE)
    assert dated, f"[{version()}] has no date: write ## [{version()}] - {time.strftime('%Y-%m-%d')}"
    return f"[{version()}] of {dated[1]}"


def sections(text: str) -> list[str]:
    """The versions a changelog has a section of, [Unreleased] among them."""
    return re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)


def unreleased(text: str) -> str:
    """What stands under [Unreleased]."""
    return text.partition("## [Unreleased]\n")[2].partition("\n## ")[0].strip()


def cut(text: str, number: str, date: str) -> str:
    """A changelog whose unreleased entries are that version's, under an empty [Unreleased]."""
    assert number not in sections(text), f"there is a section [{number}]: raise the version first"
    assert unreleased(text), "[Unreleased] has no entries"
    head, _, rest = text.partition("## [Unreleased]\n")
    return f"{head}## [Unreleased]\n\n## [{number}] - {date}\n{rest}"


def tests_pass() -> str:
    for tool in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)):
        run(sys.executable, "-m", *tool)
    return run(sys.executable, "-m", "pytest", "-q", "-n", "auto").strip().splitlines()[-1]


def generated_is_fresh() -> str:
    return run(sys.executable, "scripts/generate.py", "--check").strip()


def documentation_builds() -> str:
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder)
        return f"{sum(1 for _ in Path(folder).rglob('*.html'))} pages, no broken link"


def build_is_clean() -> str:
    for folder in (DIST, ROOT / "build"):  # what an older tree left there would be packed, too
        shutil.rmtree(folder, ignore_errors=True)
    said = run(sys.executable, "-m", "build", "--outdir", str(DIST))
    warned = [line for line in said.splitlines() if "warning" in line.lower()]
    warned = [line for line in warned if "byte-compiling is disabled" not in line]  # asked for
    assert not warned, said[-2000:]
    (wheel,) = DIST.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {"effprof/report/report.js", "effprof/schemas/estimate.json", "effprof/py.typed"}
    assert wanted <= set(names), f"not in the wheel: {wanted - set(names)}"
    assert any(name.endswith("licenses/LICENSE") for name in names), "no licence in the wheel"
    size = wheel.stat().st_size / 2**20
    assert size < WHEEL_MIB, f"the wheel has {size:.1f} MiB"
    return f"{len(names)} files, {size:.2f} MiB"


def wheel_runs() -> str:
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = []
    for minor in MINORS:
        named = shutil.which(f"python3.{minor}")
        places = [*([named] if named else []), *pyenv.glob(f"versions/3.{minor}.*/bin/python")]
        works = (p for p in places if not subprocess.run([p, "-V"], capture_output=True).returncode)
        python = next(works, None)
        if python:
            run(str(python), "scripts/wheel_smoke.py", str(DIST))
            found.append(f"3.{minor}")
    assert found, "none of these Pythons is here"
    return f"under {', '.join(found)}"


CHECKS: dict[str, Callable[[], str]] = {
    "the tree is clean": tree_is_clean,
    "one version": version_is_everywhere,
    "the changelog": changelog_has_it,
    "help snapshots": generated_is_fresh,
    "documentation": documentation_builds,
    "sdist and wheel": build_is_clean,
    "the wheel runs": wheel_runs,
    "lint and tests": tests_pass,
}


def main(arguments: list[str]) -> int:
    """Cut the changelog, or go through the list."""
    if arguments not in ([], ["--cut"], ["--skip-tests"]):
        print(__doc__)
        return 2
    if arguments == ["--cut"]:
        try:
            text = cut(CHANGELOG.read_text(encoding="utf-8"), version(), time.strftime("%Y-%m-%d"))
        except AssertionError as problem:
            print(f"Not cut: {problem}.")
            return 1
        CHANGELOG.write_text(text, encoding="utf-8")
        print(f"CHANGELOG.md: [Unreleased] is now [{version()}]. Next: git commit -am v{version()}")
        return 0
    missing = 0
    for name, check in CHECKS.items():
        if check is tests_pass and arguments:
            print(f"SKIPPED  {name}: --skip-tests says that they passed elsewhere, at this commit")
            continue
        try:
            print(f"ok       {name}: {check()}", flush=True)
        except AssertionError as problem:
            missing += 1
            print(f"MISSING  {name}: {problem}", flush=True)
    if missing:
        return 1
    files = " ".join(str(path.relative_to(ROOT)) for path in sorted(DIST.iterdir()))
    tag = f"v{version()}"
    print(f"Left to you: git tag -a {tag} -m {tag}; git push --follow-tags; upload {files}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
