"Does the house stand: notebooks and modules agree, notebooks are fit to be read, imports go one way."
import ast, re, shutil, subprocess, sys, tomllib
from configparser import ConfigParser
from pathlib import Path
import nbformat, pytest
from spklip.lab.notebooks import contents, notebooks, problems, readme_of, too_wide
from conftest import ROOT

NOTEBOOKS = notebooks()
TRACKED = [ROOT/line for line in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()]

def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in (".py", ".ipynb")}

def test_export_and_clean_change_nothing(tmp_path):
    for name in ("nbs", "spklip"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT/"settings.ini", tmp_path)
    before = files(tmp_path)
    for call in ("from nbdev.doclinks import nbdev_export; nbdev_export()", "from nbdev.clean import nbdev_clean; nbdev_clean()"):
        subprocess.run([sys.executable, "-c", call], cwd=tmp_path, check=True)
    after = files(tmp_path)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []

def test_every_module_comes_from_a_notebook():
    made = {"__init__.py", "_modidx.py", "data/__init__.py", "lab/__init__.py"}
    for path in NOTEBOOKS:
        for target in re.findall(r"#\| default_exp (\S+)", "\n".join(c.source for c in nbformat.read(path, 4).cells)):
            made.add(target.replace(".", "/") + ".py")
    assert {p.relative_to(ROOT/"spklip").as_posix() for p in (ROOT/"spklip").rglob("*.py")} == made

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_stored_notebook(path):
    assert problems(path) == []

@pytest.mark.parametrize("path", sorted((ROOT/"tests").glob("*.py")), ids=lambda p: p.stem)
def test_tests_fit_a_screen(path):
    assert too_wide(path.read_text()) == []

def test_executed_notebooks_are_whole_and_name_no_machine():
    "What a run that was stopped left half done still has papermill's paths and no end."
    executed = sorted((ROOT/"outputs").glob("laptop/notebooks/*.ipynb"))
    assert len(executed) > 20
    assert [p.name for p in executed if "papermill" in nbformat.read(p, 4).metadata] == []

def test_readme_is_the_index():
    text, images = readme_of(nbformat.read(ROOT/"nbs"/"index.ipynb", 4))
    assert (ROOT/"README.md").read_text() == text, "run `make readme`"
    for name, png in images.items(): assert (ROOT/"nbs"/"images"/name).read_bytes() == png, name

def test_index_lists_the_notebooks_there_are():
    shown = [o.data["text/markdown"] for c in nbformat.read(ROOT/"nbs"/"index.ipynb", 4).cells
             for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    assert contents() in shown, "run nbs/index.ipynb again"

def test_readme_s_results_are_the_tables_there_are():
    made = {line for table in (ROOT/"outputs"/"laptop"/"tables").glob("*.md") for line in table.read_text().splitlines()}
    told = [line for line in (ROOT/"README.md").read_text().splitlines() if re.search(r"\| (ours|reproduced|contradicted|needs data)[^|]*\|$", line)]
    assert len(told) > 50 and [line for line in told if line not in made] == [], "run nbs/index.ipynb again"

def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT/"README.md").read_text())
    assert [l for l in links if not l.startswith("http") and not (ROOT/l).exists()] == []

# who may import what from spklip, at the top of a module; inside functions `lab.cli` may use all
MODELS = {"convolution", "sparse", "hsfe", "star_net", "stcl", "fsve", "baselines"}
PLOTS = {"matplotlib", "seaborn"}

def imports(path):
    "What a module imports at its top level: `spklip.x` as `x`, others by their first name."
    inside = path.relative_to(ROOT/"spklip").parent.parts
    for s in ast.parse(path.read_text()).body:
        if isinstance(s, ast.Import): yield from (a.name.removeprefix("spklip.").split(".")[0] for a in s.names)
        if isinstance(s, ast.ImportFrom):
            up = inside[:len(inside) - s.level + 1] if s.level else ()
            name = ".".join([*up, *filter(None, [s.module])])
            yield from [name.removeprefix("spklip.").split(".")[0]] if name not in ("", "spklip") else [a.name for a in s.names]

@pytest.mark.parametrize("path", sorted((ROOT/"spklip").rglob("*.py")), ids=lambda p: p.relative_to(ROOT/"spklip").as_posix())
def test_imports_go_one_way(path):
    room, found = path.relative_to(ROOT/"spklip").parts[0].removesuffix(".py"), set(imports(path))
    if room in ("camera", "data"): assert not found & (MODELS | PLOTS | {"train", "lab"})
    if room in MODELS: assert not found & (PLOTS | {"data", "train", "lab"})
    if room == "train": assert not found & PLOTS
    if room == "lab": assert not found & (MODELS | {"camera", "data", "train"})

@pytest.mark.parametrize("path", sorted((ROOT/"spklip").rglob("*.py")), ids=lambda p: p.relative_to(ROOT/"spklip").as_posix())
def test_nothing_is_only_shown_when_a_module_is_imported(path):
    shown = [s for s in ast.parse(path.read_text()).body if isinstance(s, ast.Expr) and not isinstance(s.value, ast.Constant)]
    assert [ast.unparse(s) for s in shown if not ast.unparse(s).startswith("_")] == []

def test_requirements_are_pinned():
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    pins = {line.split("==")[0] for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    assert {re.split(r"[<>=]", r)[0] for r in wanted} <= pins

def test_one_version():
    import spklip
    settings = ConfigParser(); settings.read(ROOT/"settings.ini")
    assert settings["DEFAULT"]["version"] == spklip.__version__

def test_third_party_imports_are_required():
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=]", r)[0] for r in project["dependencies"]} | {"PIL", "spklip"}
    used = {name for path in (ROOT/"spklip").rglob("*.py") for name in imports(path)} - set(sys.stdlib_module_names)
    rooms = {p.stem for p in (ROOT/"spklip").rglob("*") if p.suffix in ("", ".py")}
    assert used - rooms <= wanted

@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_no_folder_of_one_machine():
    home = re.compile("|".join(["/" + "home/", "/" + "root/", "/" + "Users/", re.escape(str(ROOT))]))
    named = [p.relative_to(ROOT).as_posix() for p in TRACKED if p.suffix in (".py", ".ipynb", ".md", ".json", ".csv", ".toml", ".txt", ".yml", "")
             and p.is_file() and home.search(p.read_text(errors="ignore"))]
    assert named == []
