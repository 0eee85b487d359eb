"""Site of the documentation: it loads nothing from other hosts, and a dead link fails its build."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
# What a browser loads by itself, as opposed to links that a reader may follow.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?([^"'\s>]+)|<link\b[^>]*\bhref=["']?([^"'\s>]+)"""
)
LOADED_BY_CSS = re.compile(r"""url\(["']?([^)"']+)|@import\s+["']([^"']+)""")
EXTERNAL = re.compile(r"(?:https?:)?//")


def build(configuration: Path, site: Path) -> subprocess.CompletedProcess[str]:
    options = ["--strict", "--config-file", str(configuration), "--site-dir", str(site)]
    command = [sys.executable, "-m", "mkdocs", "build", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    return folder


def list_external(site: Path) -> Iterator[str]:
    for page in site.rglob("*.html"):
        addresses = ["".join(groups) for groups in LOADED.findall(page.read_text())]
        yield from (f"{page.name}: {address}" for address in addresses if EXTERNAL.match(address))
    for sheet in site.rglob("*.css"):
        addresses = ["".join(groups) for groups in LOADED_BY_CSS.findall(sheet.read_text())]
        yield from (f"{sheet.name}: {address}" for address in addresses if EXTERNAL.match(address))


def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    assert (site / "index.html").exists()
    assert list(list_external(site)) == []


def test_python_api_is_rendered_from_the_docstrings(site: Path) -> None:
    page = (site / "reference" / "python-api.html").read_text()
    assert 'id="batchjob.run"' in page
    assert "Run a job" in page


def test_external_addresses_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="https://example.com"><script src="https://example.com/a.js"></script>')
    (tmp_path / "b.css").write_text("a {background: url(//example.com/b.png)} b {background: url(b.png)}")
    assert sorted(list_external(tmp_path)) == ["a.html: https://example.com/a.js", "b.css: //example.com/b.png"]


@pytest.mark.parametrize("link", ["gone.md", "index.md#gone"])
def test_dead_link_fails_the_build(link: str, tmp_path: Path) -> None:
    options = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    kept = {name: options[name] for name in ("site_name", "strict", "validation")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**kept, "docs_dir": "pages"}))
    (tmp_path / "pages").mkdir()
    page = tmp_path / "pages" / "index.md"
    page.write_text("# Title\n\n[link](index.md#title)\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode == 0
    page.write_text(f"# Title\n\n[link]({link})\n")
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert link in built.stderr
