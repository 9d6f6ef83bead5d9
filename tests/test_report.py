from __future__ import annotations

import base64
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import study_tables as tables
import wandb
from studies import CHROMIUM, browse

from ntk_lightning.scaling import fit_power_law
from ntk_lightning.studies import figure, figure_fits
from ntk_lightning.studies.report_wandb import report

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collects what a page holds, and fails where tags do not close in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str, attribute: str) -> list[str | None]:
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.usefixtures("offline")
def test_the_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    tables.all_kinds(tmp_path)
    text = report(str(tmp_path)).read_text()
    page = Page(text)
    pictures = page.all("img", "src")
    assert len(pictures) == 12
    for source in pictures:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
    assert all("against" in alt for alt in page.all("img", "alt"))
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert not page.all("script", "src")
    assert page.all("a", "href") == [f"#{anchor}" for anchor in page.all("section", "id")]
    assert page.words.count("Hyperparameters of these runs") == 6
    assert page.words.count("Exponents of the test error") == 4
    assert "0.291" in page.words
    assert "500, 1000, 2000, 4000, 8000, 16000" in page.words
    assert "Network and K0 part after t = 100" in page.words


@pytest.mark.usefixtures("offline")
def test_the_page_escapes_what_studies_say(tmp_path: Path) -> None:
    evil = '<script>alert("1 & 2")</script>'
    rows = [tables.row("network", tables.law(1.9, 0.3, n), n=n, arm=evil) for n in tables.SIZES]
    tables.write(tmp_path, "x'\" onload=y <b>", "n", rows, caption=evil, published={evil: 0.3})
    page = Page(report(str(tmp_path)).read_text())
    assert not [tag for tag, attributes in page.tags if tag in ("script", "b") or "onload" in attributes]
    assert page.words.count(evil) >= 4


@pytest.mark.usefixtures("offline")
def test_a_study_without_losses_says_so(tmp_path: Path) -> None:
    rows = [tables.row("network", tables.law(1.9, 0.3, n), n=n, optimal_loss=None) for n in tables.SIZES]
    tables.write(tmp_path, "silent", "n", rows)
    page = Page(report(str(tmp_path)).read_text())
    assert len(page.all("img", "src")) == 1
    assert "There is no finite test loss, so no picture of it." in page.words


@pytest.mark.usefixtures("offline")
def test_offline_the_wandb_report_is_a_json_file_that_wandb_workspaces_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    internal = pytest.importorskip("wandb_workspaces.reports.v2.internal")
    tables.scaling(tmp_path)
    report(str(tmp_path), project="laws")
    spec = internal.ReportViewspec.model_validate(json.loads((tmp_path / "report.json").read_text()))
    assert spec.project.name == "laws"
    [grid] = [block for block in spec.spec.blocks if block.type == "panel-grid"]
    [runs] = grid.metadata.run_sets
    [group] = runs.filters["filters"]
    assert (group["key"]["name"], group["op"], group["value"]) == ("group", "=", "figure_1a")
    text = json.dumps([block.model_dump(mode="json") for block in spec.spec.blocks])
    assert all(key in text for key in ("test/error", "test/loss", "summary:test/optimal_error", "| 0.290 |"))
    assert "report.json" in capsys.readouterr().out


@pytest.mark.parametrize("online", [False, True])
def test_without_wandb_workspaces_there_is_the_page_and_a_sentence(
    tmp_path: Path, online: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.scaling(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda prompt: online)
    if online:
        with pytest.raises(ModuleNotFoundError, match="pip install wandb-workspaces"):
            report(str(tmp_path))
    else:
        report(str(tmp_path))
        assert "pip install wandb-workspaces" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "report.json").exists()


def test_logged_in_the_report_is_saved_with_the_pictures_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = pytest.importorskip("wandb_workspaces.reports.v2.interface")
    tables.scaling(tmp_path)
    tables.dynamics(tmp_path)
    logged: dict[str, Any] = {}
    saved = []

    class Run(SimpleNamespace):
        def __enter__(self) -> Run:
            return self

        def __exit__(self, *_: object) -> None:
            logged["finished"] = True

    def init(**options: str) -> Run:
        return Run(log=logged.update, project=options["project"], entity="team", id="run1")

    def save(self: Any) -> None:  # noqa: ANN401
        assert logged["finished"]
        self.id = "abc"
        saved.append(self)

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(interface.Report, "save", save)
    monkeypatch.setattr(interface.Report, "url", "https://wandb.example/report")
    assert report(str(tmp_path), project="laws") == tmp_path / "report.html"
    keys = ["figure_1a/error", "figure_1a/loss", "figure_1c/error", "figure_1c/loss"]
    assert [key for key in logged if isinstance(logged[key], wandb.Image)] == keys
    [made] = saved
    grids = [block for block in made.blocks if isinstance(block, interface.PanelGrid)]
    assert [grid.runsets[0].filters for grid in grids] == [
        *('Metric("ID") == "run1"', 'Metric("Group") == "figure_1a"'),
        *('Metric("ID") == "run1"', 'Metric("Group") == "figure_1c"'),
    ]
    assert grids[0].panels[0].media_keys == keys[:2]
    assert (made.entity, made.project) == ("team", "laws")
    assert not (tmp_path / "report.json").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.usefixtures("offline")
def test_a_browser_shows_the_page_without_a_complaint(tmp_path: Path) -> None:
    tables.all_kinds(tmp_path)
    assert len(re.findall("<img ", browse(report(str(tmp_path)), tmp_path / "profile"))) == 12


@pytest.mark.usefixtures("offline")
def test_the_revision_is_told_whole(tmp_path: Path) -> None:
    revision = "0123456789-dirty"
    tables.write(tmp_path, "dirty", "n", [tables.row("network", 0.2, n=n, git_revision=revision) for n in (1, 2)])
    assert f"({revision})" in Page(report(str(tmp_path)).read_text()).words


@pytest.mark.usefixtures("offline")
def test_the_wandb_report_shows_the_errors_that_the_figure_shows(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces.reports.v2.internal")
    rows = [tables.row("network", tables.law(1.9, 0.3, n), n=n) for n in tables.SIZES]
    tables.write(tmp_path, "converged", "n", rows, value="last")
    report(str(tmp_path))
    assert "summary:test/last_error" in (tmp_path / "report.json").read_text()


@pytest.mark.usefixtures("offline")
def test_a_report_sorts_the_rows_and_fits_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:  # noqa: ANN401
            counts[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(figure_fits, "fit_power_law", counted("fits", fit_power_law))
    monkeypatch.setattr(figure, "study_lines", counted("lines", figure.study_lines))
    monkeypatch.setattr(figure, "find_departures", counted("departures", figure.find_departures))
    tables.scaling(tmp_path)
    tables.dynamics(tmp_path)
    report(str(tmp_path))
    quantities, fitted_lines, laws = 2, 3, 2  # without a floor and with one
    assert counts == {"fits": quantities * fitted_lines * laws, "lines": 2 * quantities, "departures": 2 * quantities}
