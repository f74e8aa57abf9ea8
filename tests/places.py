"""Where the project's files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "main.py"
CONF = ROOT / "conf"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHARED_DATA = ROOT.parent / "shared" / "data"
