"""The documentation is true: its code and commands run, its numbers are the benchmarks', its site builds.

Longer than 300 lines, since all of it reads the same pages and the one site that is built.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from studies import SHIPPED
from studies import tiny as tiny_study
from torch.distributed.run import get_args_parser

from ntk_lightning.cli import main
from ntk_lightning.scaling import fit_power_law
from ntk_lightning.studies.config_yaml import read_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TINY = {command: DOCS / "tiny" / f"{command}.yaml" for command in ("fit", "study")}
BLOCK = re.compile(
    r'(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    title: str | None
    reason: str | None

    @property
    def commands(self) -> list[list[str]]:
        lines = self.code.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines]
        return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in found if words]


def blocks(page: Path) -> list[Block]:
    return [Block(**match.groupdict()) for match in BLOCK.finditer(page.read_text())]


PAGES = {str(page.relative_to(DOCS)): blocks(page) for page in sorted(DOCS.rglob("*.md"))}
WITH_BLOCKS = {name: found for name, found in PAGES.items() if found}
NEEDS = {"how-to/transformers.md": ("transformers", "peft")}  # of the extra `clients`; its blocks run with -m ci
LONG = {"api/cli.md", "how-to/network.md", "how-to/report.md", "how-to/uncertainty.md", "tutorial.md"}  # so do theirs


def run_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as shown; a fit or a study with the tiny overlay appended."""
    match command:
        case ["python", "-m", "ntk_lightning", *arguments] if "--help" in arguments:
            with pytest.raises(SystemExit) as end:
                main(arguments)
            assert end.value.code == 0
        case ["python", "-m", "ntk_lightning", name, *arguments]:
            main([name, *arguments, *(["--config", str(TINY[name])] if name in TINY else [])])
        case ["python", file, *arguments]:
            monkeypatch.setattr(sys, "argv", [file, *arguments])
            runpy.run_path(file, run_name="__main__")
        case _:
            pytest.fail(f"No way to run {shlex.join(command)}: mark its block <!-- not run: REASON -->.")


def check_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a command which is not run would be understood."""
    match command:
        case ["python", "-m", "ntk_lightning", "fit", *arguments]:
            with pytest.raises(SystemExit) as end:
                main(["fit", *arguments, "--print_config"])
            assert end.value.code == 0
        case ["python", "-m", "ntk_lightning", ("study" | "figures" | "report") as name, *arguments]:
            called: list[dict[str, Any]] = []
            module = {"study": "study", "figures": "figure_draw", "report": "report_wandb"}[name]
            monkeypatch.setattr(f"ntk_lightning.studies.{module}.{name}", lambda **options: called.append(options))
            main([name, *arguments])
            if name == "study":
                assert read_config(called[0]["config"], called[0]["scale"]).cells()
        case ["python", file, *arguments]:
            source = (ROOT / file).read_text()
            assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
        case ["torchrun", *arguments]:
            parsed = get_args_parser().parse_args(arguments)
            prefix = ["python", "-m"] if parsed.module else ["python"]
            check_command([*prefix, parsed.training_script, *parsed.training_script_args], monkeypatch)
        case ["pip", "install", *what]:
            extras = {extra for word in what for extra in re.findall(r"\[([\w,]+)\]", word)}
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert {name for extra in extras for name in extra.split(",")} <= set(known)
        case ["ray", name, *arguments]:
            scripts = pytest.importorskip("ray.scripts.scripts")
            known = {option for parameter in scripts.cli.commands[name].params for option in parameter.opts}
            assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known
        case ["sbatch", file]:
            assert (ROOT / file).read_text().startswith("#!")
        case ["wandb", "login"]:
            pass
        case _:
            pytest.fail(f"No way to check {shlex.join(command)}.")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    text = (DOCS / page).read_text()
    assert 2 * len(PAGES[page]) == len(re.findall(r"^\s*```", text, re.MULTILINE)), "a fence that the test does not see"
    assert len(re.findall("<!-- not run", text)) == sum(block.reason is not None for block in PAGES[page])
    for block in PAGES[page]:
        assert block.language in ("python", "bash", "yaml", "text"), block
        assert block.language != "yaml" or block.title, "YAML is written to the file that its title names"
        others = "".join(other.code for other in PAGES[page] if other is not block)
        assert block.title is None or Path(block.title).stem in others, f"nothing uses {block.title}"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.ci] if page in NEEDS or page in LONG else []) for page in WITH_BLOCKS],
)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for folder in ("cli_configs", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(WITH_BLOCKS[page]):
        if block.title is not None:
            Path(block.title).write_text(block.code)
        elif block.language == "python" and block.reason is None:
            exec(compile(block.code, f"{page}, block {number}", "exec"), names)
        elif block.language == "python":
            compile(block.code, f"{page}, block {number}", "exec")
        elif block.language == "bash":
            for command in block.commands:
                with monkeypatch.context() as patch:
                    (run_command if block.reason is None else check_command)(command, patch)


def test_how_many_blocks_run() -> None:
    code = [block for found in PAGES.values() for block in found if block.language != "text"]
    assert sum(block.reason is None for block in code) >= 30
    assert sum(block.reason is not None for block in code) <= len(code) / 3


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme, about a future release of MkDocs
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    return folder


def html(site: Path, page: str) -> str:
    path = site / page.removesuffix(".md") / "index.html" if not page.endswith("index.md") else site / "index.html"
    return path.read_text()


def test_site_has_every_page_and_asks_no_other_host(site: Path) -> None:
    for page in PAGES:
        text = html(site, page)
        loaded = re.findall(r'<(?:script|img|source|iframe)[^>]*\bsrc="(?:https?:)?//([^"]+)', text)
        loaded += re.findall(
            r'<link[^>]*\brel="(?:stylesheet|preconnect|preload)"[^>]*\bhref="(?:https?:)?//([^"]+)', text
        )
        assert not loaded, f"{page} loads {loaded}"
        assert not re.search(r":(?:class|func|meth|mod):`", text), f"{page} shows a role that is not rendered"


def test_formulas_are_mathml(site: Path) -> None:
    text = html(site, "mathematics.md")
    source = re.sub(r"```.*?```", "", (DOCS / "mathematics.md").read_text(), flags=re.DOTALL)
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+?\$", source, re.DOTALL)
    assert text.count("<math") == len(formulas) > 100
    assert "arithmatex" not in text
    assert not re.search(r"<mi>\\|<mi>&</mi>|<mtext>\\", text), "TeX that was not understood"


def test_public_names_are_in_the_reference(site: Path) -> None:
    for package in ("networks", "kernels", "modules", "solvers", "callbacks", "datamodules", "scaling", "studies"):
        text = html(site, f"api/{package}.md")
        for name in __import__(f"ntk_lightning.{package}", fromlist=["*"]).__all__:
            assert re.search(rf'id="ntk_lightning\.{package}(\.\w+)?\.{name}"', text), name


def test_reference_lists_no_hook_and_no_name_twice(site: Path) -> None:
    headings = {
        page: re.findall(r'<h\d id="ntk_lightning\.([\w.]+)"', html(site, page)) for page in PAGES if "api/" in page
    }
    for page in ("api/callbacks.md", "api/modules.md"):
        hooks = [
            name for name in headings[page] if re.search(r"\.(on_\w+|setup|teardown|(load_)?state_dict|_\w*)$", name)
        ]
        assert not hooks
    names = [name.rsplit(".", 1)[1] for name in headings["api/studies.md"] if name.rsplit(".", 1)[1][0].isupper()]
    assert len(names) == len(set(names))
    assert {"Line", "Cell"} <= set(names)


def rows(text: str) -> list[list[str]]:
    found = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [[re.sub("<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in found]


OF_PEER = ("neural_tangents_pairs_per_s", "ratio", "ratio_per_core")


@cache
def results(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return content


def test_performance_page_has_the_numbers_of_the_benchmarks(site: Path) -> None:
    shown = rows(html(site, "performance.md"))
    for row in results("infinite_ntk_cpu")["speed"]:
        (line,) = [cells for cells in shown if cells and cells[0] == row["network"] and len(cells) == 5]
        for cell, key in zip(line[1:], ("pairs_per_s", *OF_PEER), strict=True):
            assert cell == "not measured" if key not in row else float(cell) == pytest.approx(row[key], rel=5e-3)
    for part in ("speed", "taylor"):
        for name, seconds in results("empirical_ntk_cpu")[part]["seconds"].items():
            (line,) = [cells for cells in shown if cells and cells[0] == name]
            assert float(line[1]) == pytest.approx(min(seconds), rel=0.06)
    for part in ("gram", "product"):
        ratio = f"{results('other_libraries_cpu')[part]['ratio']:.2f}"
        assert any(len(cells) == 6 and cells[4] == ratio for cells in shown)
    for picture in ("infinite", "empirical"):
        assert (site / "performance" / f"{picture}.svg").read_text().endswith("</svg>\n")


def test_performance_page_without_a_peer_and_with_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "plugins"))
    import performance  # the site's, not a package

    for file in performance.RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    alone = json.loads((tmp_path / "infinite_ntk_cpu.json").read_text())
    for row in alone["speed"]:
        row |= {"network": f"alone {row['network']}"}
        for key in {*OF_PEER, "neural_tangents_pairs_per_core_s"} & set(row):
            del row[key]
    (tmp_path / "infinite_ntk_cpu.json").write_text(json.dumps(alone))
    times = {"wall": {"lightning": 2.0, "us": 2.2}, "processor": {"lightning": 1.0, "us": 1.125}}
    imports = {
        "machine": alone["machine"],
        "statements": {"lightning": "import lightning", "us": "import us"},
        "median_seconds": times,
        "ratios": {"us": {"peer": "lightning", "wall": 1.1, "processor": 1.125}},
    }
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    (tmp_path / "import_time.json").unlink(missing_ok=True)
    assert "not measured" in performance.tables()["imports"]
    (tmp_path / "import_time.json").write_text(json.dumps(imports))
    tables = performance.tables()
    assert tables["infinite"].count("| not measured | not measured | not measured |") == len(alone["speed"])
    assert "| `import us` | 2.20 | 1.12 | 1.125 times lightning |" in tables["imports"]
    assert "`import_time.json`" in tables["machines"]
    assert "alone Myrtle-5, ours" in performance.pictures()["infinite"]


def test_comparison_stands_in_the_readme_with_the_numbers_of_the_benchmarks() -> None:
    table = re.search(r"<!-- comparison -->\n(.*?)\n\n", (DOCS / "comparison.md").read_text() + "\n\n", re.DOTALL)
    assert table is not None
    assert table[1] in (ROOT / "README.md").read_text()
    seconds = {name: min(values) for name, values in results("empirical_ntk_cpu")["speed"]["seconds"].items()}
    infinite = results("infinite_ntk_cpu")["speed"][0]
    measured = {
        *([f"{infinite['ratio']:.0f}x"] if "ratio" in infinite else []),
        *(
            f"{seconds[name] / seconds['EmpiricalNTK']:.1f}x"
            for name in seconds
            if name.startswith(("jacrev", "neural"))
        ),
        f"{results('other_libraries_cpu')['gram']['ratio']:.1f}x",
        f"{results('other_libraries_cpu')['product']['ratio']:.2f}x",
    }
    assert set(re.findall(r"\b[\d.]+x(?= its speed)", table[1])) == measured
    commands = {command for row in table[1].splitlines() for command in re.findall(r"`((?:python|pip) [^`]+)`", row)}
    assert len(commands) >= 12
    for command in commands:
        words = [word for word in shlex.split(command) if "/" in word or word.startswith("--")]
        for file in (word for word in words if "/" in word):
            assert (ROOT / file).is_file(), command
            assert all(f'"{word}"' in (ROOT / file).read_text() for word in words if word.startswith("--")), command


def test_comparison_with_neural_tangents_has_each_of_its_names() -> None:
    text = (DOCS / "neural-tangents.md").read_text()
    # of its package, of its `predict` and of its `stax`, version 0.6.5, without enumerations
    names = """
        batch empirical_kernel_fn empirical_nngp_fn empirical_ntk_fn empirical_ntk_vp_fn linearize NtkImplementation
        taylor_expand monte_carlo_kernel_fn Kernel empirical_ntk_fn_tf get_apply_fn_and_params gradient_descent
        gradient_descent_mse gradient_descent_mse_ensemble gp_inference max_learning_rate ODEState Gaussian
        diag_reg diag_reg_absolute_scale parallel serial repeat ABRelu Abs Cos Elementwise ElementwiseNumerical Erf Exp
        ExpNormalized Gabor Gelu Hermite LeakyRelu Monomial Polynomial Rbf RectifiedMonomial Relu Sigmoid_like Sign Sin
        Aggregate AvgPool Conv ConvLocal ConvTranspose Dense Identity Index DotGeneral Dropout Flatten GlobalAvgPool
        GlobalSelfAttention GlobalSumPool ImageResize LayerNorm SumPool Slice FanInConcat FanInProd FanInSum FanOut
        MaskedArray layer requires supports_masking unmask_fn
    """
    missing = [name for name in names.split() if not re.search(rf"`[^`]*\b{name}\b[^`]*`", text)]
    assert not missing


def test_command_line_page_has_every_overlay_and_study() -> None:
    text = (DOCS / "api" / "cli.md").read_text()
    overlays = {file.name for file in (ROOT / "cli_configs" / "overlays").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+\.yaml)` \|", text, re.MULTILINE)) == overlays
    assert set(re.findall(r"`cli_configs/studies/(\w+\.yaml)` \|$", text, re.MULTILINE)) == {
        file.name for file in SHIPPED
    }


@pytest.mark.ci
def test_page_names_everything_that_a_run_and_a_study_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = {
        "trainer": {
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "runs", "name": "csv"},
            },
            "callbacks+": [
                {"class_path": "ntk_lightning.callbacks.KernelDiagnostics", "init_args": {"leading": 2}},
                {"class_path": "ntk_lightning.callbacks.StopAtTrainError", "init_args": {"threshold": 0.0}},
            ],
        },
        "data": {"init_args": {"n_val": 8}},
    }
    Path("more.yaml").write_text(yaml.safe_dump(more))
    main(["fit", "--config=cli_configs/myrtle64.yaml", f"--config={TINY['fit']}", "--config=more.yaml"])
    overlay = tiny_study(ROOT / "cli_configs" / "studies" / "figure_1a.yaml", tmp_path)
    main(["study", "--config=cli_configs/studies/figure_1a.yaml", f"--config={overlay}", "--output=study", "--plan"])
    main(["study", "--config=cli_configs/studies/figure_1a.yaml", f"--config={overlay}", "--output=study"])
    main(["figures", "study"])
    main(["report", "study"])
    headers = {file.name: file.open().readline().strip().split(",") for file in Path("runs").rglob("*.csv")}
    metrics = headers.pop("metrics.csv")
    assert len(headers) == 6
    assert len(metrics) > 20
    schema = pq.read_schema("study/figure_1a.parquet").names
    files = {
        f"KEY{file.suffix}" if file.parent.name in ("cells", "networks") else re.sub("^figure_1a", "NAME", file.name)
        for folder in ("runs/csv", "study")
        for file in Path(folder).rglob("*")
        if file.is_file() and not {"grams", "checkpoints"} & set(file.parts)
    }
    text = (DOCS / "what-a-run-writes.md").read_text()
    shown = set(re.findall(r"`([^`\n]+)`", text)) | {name.split("/")[-1] for name in re.findall(r"`([^`\n]+)`", text)}
    names = {name for header in (*headers.values(), metrics, schema) for name in header}
    wanted = {re.sub(r"(?<=test_error_)\d+$", "N", name) for name in names - {"eigenvalue_2", "kernel/eigenvalue_2"}}
    assert not wanted - shown
    assert not files - {"metrics.csv"} - shown  # the logger's own


STUDIED = {  # section of the results page: the study's table, what stands over its columns
    "Data scaling": ("figure_1a", "n"),
    "Width at": ("figure_2b", "width"),
    "The after-kernel": ("figure_4a", "n"),
    "What the kernel learns": ("figure_4b", "m"),
    "The kernel during": ("figure_5a", "t"),
}
LINES = {  # of its tables: model and column
    "network": ("network", "optimal_error"),
    "empirical NTK": ("empirical", "optimal_error"),
    "infinite NTK": ("infinite", "optimal_error"),
    "$K_n(n)$": ("after-kernel", "optimal_error"),
    "$K_n^F(n)$": ("after-kernel, fresh", "optimal_error"),
    "$K_m^F(500)$": ("after-kernel, fresh", "optimal_error"),
    "$K^t$, fitted": ("kernel during training", "optimal_error"),
    "network at step t": ("kernel during training", "network_error"),
    "$K^0$, trained for t steps": ("kernel during training", "initial_error"),
}


@pytest.mark.parametrize("section", STUDIED)
def test_results_page_has_the_errors_and_exponents_of_the_studies(section: str) -> None:
    study, axis = STUDIED[section]
    text = next(part for part in (DOCS / "results-32x32.md").read_text().split("\n## ") if part.startswith(section))
    header, _, *lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    places = [int(cell) for cell in header if cell.strip().isdecimal()]
    assert len(places) >= 3
    assert lines
    for label, *cells in lines:
        model, column = LINES[label.strip()]
        found = [row for row in results("cifar10_dog_horse")["studies"][study] if row["model"] == model]
        errors = [[row[column] for row in found if row[axis] == place] for place in places]
        shown = [cell.strip() for cell in cells[: len(places)]]
        assert shown == [f"{sum(seeds) / len(seeds):.1%}" if seeds else "" for seeds in errors]
        if (exponent := "".join(cells[len(places) : len(places) + 1]).strip()) and axis != "width":
            measured = [(place, seeds) for place, seeds in zip(places, errors, strict=True) if seeds]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of few sizes
                fit = fit_power_law([place for place, _ in measured], [*zip(*(s for _, s in measured), strict=True)])
            low, high = fit.beta_interval
            assert exponent == f"{fit.beta:.3f} [{low:.2f}, {high:.2f}]"


NEURAL_TANGENTS = """
    ABRelu Abs Aggregate AggregateImplementation AttentionMechanism AvgPool Bool Conv ConvLocal ConvTranspose Cos Dense
    Diagonal DotGeneral Dropout Elementwise ElementwiseNumerical Erf Exp ExpNormalized FanInConcat FanInProd FanInSum
    FanOut Flatten Gabor Gaussian Gelu GlobalAvgPool GlobalSelfAttention GlobalSumPool Hermite Identity ImageResize
    Index
    LayerNorm LeakyRelu MaskedArray Monomial Padding Polynomial PositionalEmbedding Rbf RectifiedMonomial Relu
    Sigmoid_like Sign Sin Slice SumPool layer parallel repeat requires serial supports_masking unmask_fn
    ODEState gp_inference gradient_descent gradient_descent_mse gradient_descent_mse_ensemble max_learning_rate
    Kernel NtkImplementation DEFAULT_NTK_IMPLEMENTATION batch empirical_kernel_fn empirical_nngp_fn empirical_ntk_fn
    empirical_ntk_vp_fn linearize monte_carlo_kernel_fn taylor_expand empirical_ntk_fn_tf get_apply_fn_and_params
"""  # every public name of stax, predict, experimental and the main module of version 0.6.5


def test_every_public_name_of_neural_tangents_is_in_the_tables() -> None:
    text = (DOCS / "neural-tangents.md").read_text()
    left = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| "))
    listed = {word for code in re.findall(r"`([^`]+)`", left) for word in re.findall(r"\w+", code)}
    assert set(NEURAL_TANGENTS.split()) <= listed
