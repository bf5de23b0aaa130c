"The lab: parameters, cached runs, verdicts, manifests, and a whole `spklip reproduce` on a project of two cells."
import hashlib, json, math, os, platform, signal, statistics, subprocess, sys, threading, time
from dataclasses import make_dataclass
from functools import partial
import nbformat, pytest
from hypothesis import given, settings, strategies as st
from spklip.data.datasets import FIELDS
from spklip.lab import cli, notebooks, report, reproduce, runs, tables
from spklip.lab.paper import NUMBERS, number
from conftest import ROOT

def write(path, *code, parameters=0):
    "A notebook of code cells; the cell of that number is its parameters."
    cells = [nbformat.v4.new_code_cell(c, metadata={"tags": ["parameters"]} if i == parameters else {}) for i, c in enumerate(code)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebooks.without_traces(nbformat.v4.new_notebook(cells=cells)), path)
    return path

# running

def test_unknown_parameter_is_refused_before_anything_runs(tmp_path):
    path = write(tmp_path/"n.ipynb", 'preset = "smoke"\nseed = 0')
    with pytest.raises(ValueError, match="no parameter sede; it has: preset, seed"):
        notebooks.run_notebook(path, tmp_path/"out.ipynb", sede=1)
    assert not (tmp_path/"out.ipynb").exists()

@pytest.mark.parametrize("cell", ["a = b", "a, b = 1, 2", "import os", "a = open('x')"])
def test_parameters_are_literals(tmp_path, cell):
    with pytest.raises(ValueError, match="is no `name = literal`"): notebooks.parameters_of(write(tmp_path/"n.ipynb", cell))

def test_parameters_tag_must_be_there_once(tmp_path):
    with pytest.raises(ValueError, match="0 cells are tagged"): notebooks.parameters_of(write(tmp_path/"n.ipynb", "a = 1", parameters=None))

def test_run_sets_parameters_and_leaves_no_trace(tmp_path):
    path = write(tmp_path/"n.ipynb", 'text = "a"\nrate = 1.0', "import os", "print(text, rate, os.getcwd())")
    done = notebooks.run_notebook(path, tmp_path/"deep"/"er"/"n.ipynb", text="it's", rate=2.5)
    notebook = nbformat.read(done, 4)
    assert notebook.cells[-1].outputs[0].text == f"it's 2.5 {ROOT}\n"
    assert "papermill" not in notebook.metadata and all(set(c.metadata) <= {"tags"} for c in notebook.cells)

def test_a_kernel_that_does_not_start_is_started_once_more(tmp_path, monkeypatch):
    "Not for ever, and not one that dies later."
    import papermill
    path, starts = write(tmp_path/"n.ipynb", "a = 1"), []
    def start(said, dies, *words, **more):
        starts.append(said)
        if len(starts) <= dies: raise RuntimeError(said)
        nbformat.write(nbformat.read(path, 4), words[1])
    for said, dies, tries in (("Kernel died before replying to kernel_info", 1, 2), ("Kernel died before replying to kernel_info", 9, 2),
                              ("Kernel died", 9, 1)):
        starts.clear()
        monkeypatch.setattr(papermill, "execute_notebook", partial(start, said, dies))
        if dies == 1: assert notebooks.run_notebook(path, tmp_path/"out.ipynb").exists()
        else:
            with pytest.raises(RuntimeError, match=said): notebooks.run_notebook(path, tmp_path/"out.ipynb")
        assert len(starts) == tries

def test_failing_cell_raises(tmp_path):
    with pytest.raises(Exception, match="no light") as failed:
        notebooks.run_notebook(write(tmp_path/"n.ipynb", "a = 1", "raise ValueError('no light')"), tmp_path/"out.ipynb")
    assert cli.one_line(failed.value).startswith("cell [2] failed: ValueError no light")

def test_problems_are_seen(tmp_path):
    path = write(tmp_path/"n.ipynb", "a = 1", "import os\nx = 2", "#| export\n" + "y = 1\n"*50, f"where = '{ROOT}'", "z = [" + "1, "*60 + "]",
                 'text = """' + "words "*60 + '"""')
    found = "; ".join(notebooks.problems(path, limit=100))
    for words in ("more than 100", "imports and other code in the cell `import os`", "51 lines in an exported cell", "without outputs",
                  "folder of this machine", "a line of 186 columns: `z = [1,"):
        assert words in found
    assert found.count("columns") == 1 # text in triple quotes may be as long as it likes
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="skipped from here on: a package")]
    nbformat.write(notebook, path)
    assert "stored where something was missing: skipped from here on: a package" in notebooks.problems(path)

# cached runs

configs = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                       lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)

@settings(deadline=None, max_examples=50)
@given(configs, configs)
def test_digest_tells_configurations_apart(a, b):
    same = json.dumps(runs.plain(a), sort_keys=True) == json.dumps(runs.plain(b), sort_keys=True)
    assert (runs.digest(a) == runs.digest(b)) == same

def test_digest_is_stable_across_versions_and_machines():
    assert runs.digest({"b": (1, 2.5), "a": "x"}) == hashlib.sha256(b'{"a":"x","b":[1,2.5]}').hexdigest()[:10]

def test_digest_knows_the_class():
    one, two = (make_dataclass(name, [("lr", float)], frozen=True)(1e-3) for name in ("One", "Two"))
    assert runs.digest(one) != runs.digest(two)

def test_cached_runs_once_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path))
    calls = []
    def make(folder):
        calls.append(folder)
        if len(calls) == 1: (folder/"half").touch(); raise KeyboardInterrupt
        return {"resumed": (folder/"half").exists()}
    with pytest.raises(KeyboardInterrupt): runs.cached("r", {"a": 1}, make)
    assert runs.cached("r", {"a": 1}, make) == {"resumed": True} == runs.cached("r", {"a": 1}, make)
    assert len(calls) == 2 and calls[0] == calls[1]
    assert runs.cached("r", {"a": 2}, make) == {"resumed": False}
    assert [r["config"] for r in sorted(runs.finished(), key=lambda r: r["config"]["a"])] == [{"a": 1}, {"a": 2}]

def note_where(name): runs.cached("where", name, lambda folder: name)

def test_workers_keep_runs_where_the_caller_does(tmp_path, monkeypatch):
    "Also when they began while it kept them elsewhere."
    for place in "ab":
        monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path/place))
        runs.side_by_side(note_where, {k: (f"{place}{k}",) for k in "123456"}, at_once=2)
        assert sorted(r["result"] for r in runs.finished()) == [f"{place}{k}" for k in "123456"]

def beat(path):
    for _ in range(1200):
        with path.open("a") as f: f.write("x")
        time.sleep(.05)

def fail_beside(path):
    while not path.exists(): time.sleep(.05)
    raise ValueError("no good")

def test_what_fails_stops_the_others(tmp_path):
    "Also a process that dies, as one that the system takes the memory from."
    heart = tmp_path/"beats"
    with pytest.raises(ValueError, match="no good"):
        runs.side_by_side(lambda work, path: work(path), {"good": (beat, heart), "bad": (fail_beside, heart)}, at_once=2)
    beats = heart.stat().st_size; time.sleep(.5)
    assert heart.stat().st_size == beats
    with pytest.raises(RuntimeError, match="a process died, of 2"): runs.side_by_side(os._exit, {"gone": (1,), "too": (1,)}, at_once=2)

def test_a_folder_is_of_one_configuration(tmp_path):
    config = dict(train=dict(epochs=3, lr=1e-3), seed=0)
    for _ in range(2): runs.belongs(tmp_path/"run", config)
    with pytest.raises(ValueError, match=r"of another run: its train.epochs is 3, not 4; more is None, not 1; name another"):
        runs.belongs(tmp_path/"run", dict(train=dict(epochs=4, lr=1e-3), seed=0, more=1))
    assert runs.differences(dict(a=[1, 2]), dict(a=[1, 2])) == []

@pytest.mark.parametrize("n, t95", [(2, 12.706), (10, 2.262), (11, 2.228), (31, 2.042), (1001, 1.962)]) # from a table of Student's t
def test_a_difference_of_any_number_of_seeds(n, t95):
    apart = [float(i % 2) for i in range(n)]
    mean, low, high = tables.difference(apart, [0.]*n)
    assert (high - low)/2 == pytest.approx(t95*statistics.stdev(apart)/n**.5, rel=5e-4) and (low + high)/2 == pytest.approx(mean)
    with pytest.raises(ValueError, match=f"{n} and 1 values"): tables.difference(apart, [0.])

def test_what_a_difference_says():
    assert [tables.compared(*ends) for ends in ((0.1, 2), (-2, -0.1), (-1, 1), (0, 1), (3.1, 3.1), (-math.inf, math.inf))] == ["more", "less",
        *["within noise"]*4]
    assert tables.with_interval(*tables.difference([93., 92.], [91., 91.])) == "+1.5 [-4.9, +7.9]" and tables.with_interval(*tables.difference([93.],
        [91.])) == "+2.0, one value"

def test_who_waits_says_so(tmp_path, capsys):
    lock = lambda wait: runs.locked(tmp_path/".lock", "another process makes it", wait)
    with lock(False): pass
    assert capsys.readouterr().out == ""
    with lock(False):
        with pytest.raises(ValueError, match="another process makes it"), lock(False): pass
        other = threading.Thread(target=lambda: lock(True).__enter__(), daemon=True); other.start(); other.join(0.5)
    assert "another process makes it; waiting" in capsys.readouterr().out

def test_sigterm_ends_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), runs.stopped_by_sigterm(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before

def test_seeds_asked_for_are_those_of_real_video_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reproduce, "REAL", {"weizmann": str(tmp_path/"{seed}")})
    (tmp_path/"0").mkdir(); (tmp_path/"0"/"metadata.jsonl").touch()
    seeds = {s.name: s.values.get("seeds") for s in reproduce.whole({"preset": "laptop", "seeds": 1})}
    assert seeds["04_train"] == seeds["04_train_weizmann"] == 1 and "04_train_weizmann" not in {s.name for s in reproduce.whole({"preset": "laptop"})}
    assert f"`spklip data weizmann {tmp_path/'1'} --seed 1; spklip data weizmann {tmp_path/'2'} --seed 2`" in capsys.readouterr().out
    reproduce.whole({"preset": "laptop", "seed": 3, "seeds": 2})
    assert f"`spklip data weizmann {tmp_path/'3'} --seed 3; spklip data weizmann {tmp_path/'4'} --seed 4`" in capsys.readouterr().out
    assert {s.name: s.values.get("seeds") for s in reproduce.whole({"preset": "laptop", "seeds": 0})}["04_train"] == 3
    monkeypatch.setattr(reproduce, "REAL", {"arid": str(tmp_path/"none")})
    reproduce.whole({"preset": "laptop"})
    assert f"`spklip data arid {tmp_path/'none'} --seed 0`" in capsys.readouterr().out

def test_an_idle_core_begins_with_what_comes_next(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "REAL", {"a": str(tmp_path/"lost"), "b": str(tmp_path/"b-{seed}"), "c": str(tmp_path/"c")})
    for name in ("b-0", "c"): (tmp_path/name).mkdir(); (tmp_path/name/"metadata.jsonl").touch()
    steps = {s.name: s.parameters().get("next_data") for s in reproduce.whole({"preset": "laptop", "seeds": 1})}
    assert steps["04_train_b"] == str(tmp_path/"c") and steps["04_train_c"] is steps["04_train"] is None

def test_fingerprint_sees_every_change(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metadata.jsonl"): runs.fingerprint(tmp_path)
    data, far = tmp_path/"data", tmp_path/"far"
    data.mkdir(); far.mkdir(); (data/"linked").symlink_to(far)
    rows = [json.dumps({field: kind(1) for field, kind in FIELDS.items()} | {"split": "train", "file": name}) + "\n"
            for name in ("a.dat", "linked/b.DAT", "c.dat")]
    (data/"metadata.jsonl").write_text("".join(rows[:2])); (data/"a.dat").write_bytes(b"12"); (far/"b.DAT").write_bytes(b"12")
    seen = {runs.fingerprint(data)}
    for change in (lambda: (data/"a.dat").write_bytes(b"123"), lambda: (data/"a.dat").write_bytes(b"124"), lambda: (far/"b.DAT").write_bytes(b"124"),
                   lambda: (data/"metadata.jsonl").write_text("".join(rows)), lambda: (data/"c.dat").touch()):
        time.sleep(.01); change(); seen.add(runs.fingerprint(data))
    (data/"index").mkdir(); (data/"index"/"embeddings.npy").touch(); (data/"d.dat").touch() # nobody names these
    assert len(seen) == 6 and runs.fingerprint(data) in seen

def test_a_job_alone_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.delenv("SPKLIP_RUNS")
    runs.side_by_side(os.getpid, {"only": ()})
    assert "SPKLIP_RUNS" not in os.environ

def test_a_damaged_result_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path))
    assert runs.cached("r", {}, lambda _: 1) == 1
    (done := runs.run_folder("r", {})/"done.json").write_text("[")
    for read in (lambda: runs.cached("r", {}, lambda _: 1), runs.finished):
        with pytest.raises(ValueError, match=f"{done} is no JSON"): read()

def test_runs_that_a_launcher_would_let_wait_for_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes of a launcher"): runs.cached("r", {}, print)

# tables

@pytest.mark.parametrize("ours, same, tolerance, status", [(None, False, None, "needs data"), ([90.0], False, None, "ours"),
    ([92.0], True, 1.0, "reproduced"), ([92.2], True, 1.0, "contradicted"), ([81.0, 101.0], True, 1.0, "reproduced")])
def test_verdicts(ours, same, tolerance, status):
    assert tables.row("top-1", ours, number("table1.spklip_top1"), same=same, tolerance=tolerance)["status"] == status

def test_a_comparison_needs_a_tolerance():
    with pytest.raises(ValueError, match="tolerance"): tables.row("top-1", 91.0, number("table1.spklip_top1"), same=True)
    assert tables.row("top-1", 87.0, number("table4.hmdb_all"), same=True)["status"] == "reproduced" # the paper's 2.21, twice

def test_what_is_no_number_is_no_result():
    with pytest.raises(ValueError, match="top-1: .*nan.* holds what is no number"): tables.row("top-1", [90.0, float("nan")])
    with pytest.raises(ValueError, match="top-1: no values"): tables.row("top-1", [])

def test_small_numbers_keep_their_digits():
    assert tables.plus_minus(0.0576, 0.0031) == "0.0576 ± 0.0031" and tables.plus_minus(12.3, 0.0004) == "12.30 ± 0.0004"
    assert tables.plus_minus(98.44, 0.68) == "98.44 ± 0.68" and tables.plus_minus(0., None) == "0.00"
    assert [tables.digits_of(x) for x in (91.15, 1.375, 0.0036, 30., None)] == [2, 3, 4, 2, 2]

def test_a_table_needs_a_row(tmp_path):
    results = tables.Results("smoke", tmp_path)
    with pytest.raises(ValueError, match="none: a table needs a row"): results.table("none", [])
    results.table("other", [dict(status="fine")])
    assert [p.name for p in (tmp_path/"smoke"/"tables").iterdir()] == ["other.csv"]

def test_rows_carry_mean_std_and_seeds():
    row = tables.row("top-1", [90, 92, 94], number("table1.spklip_top1"), data="ours")
    assert (row["ours"], row["std"], row["n"]) == (92, 2, 3)
    assert "| top-1 | 91.15 | HMDB51-S | 92.00 ± 2.00 (n=3) | ours | % | ours |" in tables.as_markdown([row])

def test_manifest_merges_and_names_no_machine(tmp_path):
    results = tables.Results("smoke", tmp_path)
    results.manifest("b", seeds=(0, 1)); results.manifest("a"); results.manifest("b", seeds=(2,), seconds=3)
    text = (tmp_path/"smoke"/"manifest.json").read_text()
    kept = json.loads(text)
    assert list(kept) == ["a", "b"] and kept["b"]["seeds"] == [2] and kept["b"]["packages"]["torch"]
    assert str(ROOT) not in text and (platform.node() or "?") not in text

def test_the_papers_numbers_add_up():
    v = {k: n.value for k, n in NUMBERS.items()}
    assert v["table4.hmdb_all"] == v["table3.blocks_5"] == v["table2.hsfe_full"] == v["table1.spklip_top1"]
    assert abs(1 - v["table6.snn_total"]/v["table6.ann_total"] - v["table6.total_saving"]/100) < 1e-3
    assert abs(v["table6.snn_memory"]/v["table6.snn_total"] - v["table6.snn_memory_share"]/100) < 1e-3

# the whole way, on a project whose main notebook is three cells

@pytest.fixture
def project(tmp_path):
    (tmp_path/"spklip").mkdir(); (tmp_path/"settings.ini").touch()
    write(tmp_path/"nbs"/"04_train.ipynb", 'preset = "smoke"\ndata = ""\nseeds = 1', "from pathlib import Path", "import os, time",
          "(Path('outputs')/preset/'tables').mkdir(parents=True, exist_ok=True); (Path('outputs')/preset/'tables'/'one.md').write_text(str(seeds))\n"
          "print('kernel', os.getpid(), flush=True)\nif os.environ.get('WAIT'): time.sleep(60)")
    return tmp_path

def spklip(project, *words, **environment):
    return subprocess.Popen([sys.executable, "-c", "import sys; from spklip.lab.cli import main; sys.exit(main())", *words], cwd=project, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # what runs in the background has it ignored

def test_reproduce(project):
    process = spklip(project, "reproduce", "--preset", "laptop", "--seeds", "3")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "[1/1] 04_train, seeds 3, preset laptop" in out and "kernel" in out and "all of it: outputs/laptop/report.html" in out
    assert (project/"outputs"/"laptop"/"notebooks"/"04_train.ipynb").exists() and "Table 4" in (project/"outputs"/"laptop"/"report.html").read_text()
    assert (project/"outputs"/"laptop"/"tables"/"one.md").read_text() == "3"

def test_reproduce_only_some(project):
    write(project/"nbs"/"05_other.ipynb", 'preset = "smoke"\nsize = 2', "import os", "print('other', preset, size)")
    out, err = spklip(project, "reproduce", "--only", "05", "--set", "size=3").communicate(timeout=60)
    assert "other laptop 3" in out and "kernel" not in out, err

@pytest.mark.parametrize("words, says", [
    ("--only 05 --set sise=3", "--set sise=3: NAME=VALUE expected, NAME one of size"),
    ("--only 05 --set size=None", "--set size=None: size is of type int, as 2 is"),
    ("--only 05 --set size=two", "--set size=two: size is of type int, as 2 is"),
    ("--only 05 --seeds 3", "--seeds 3: for notebooks that train; of 05_other none has seeds"),
    ("--only 05,99", "--only 05,99: no notebook starts with '99'; there are 04_train, 05_other"),
    ("--only=", "--only : no notebook starts with ''; there are 04_train, 05_other"), # of a shell's empty variable
    ("--set data=data/mine", "--data and --start make other results than the main ones: give them a --name")])
def test_what_cannot_be_reproduced(project, monkeypatch, capsys, words, says):
    write(project/"nbs"/"05_other.ipynb", 'preset = "smoke"\nsize = 2', "import os", "print('other', preset, size)")
    monkeypatch.chdir(project)
    assert cli.main(["reproduce", *words.split()]) == 2 and capsys.readouterr().err == f"spklip reproduce: {says}\n"

def test_a_stopped_notebook_leaves_the_copy_that_was_there(project):
    there = project/"outputs"/"smoke"/"notebooks"/"04_train.ipynb"
    there.parent.mkdir(parents=True); there.write_text("of before")
    process = spklip(project, "reproduce", "--preset", "smoke", WAIT="1")
    assert any(line.startswith("kernel") for line in process.stdout)
    process.send_signal(signal.SIGINT); process.communicate(timeout=30)
    assert [p.read_text() for p in there.parent.iterdir()] == ["of before"]

def test_ctrl_c_stops_the_kernel_and_says_how_to_go_on(project):
    process = spklip(project, "reproduce", "--preset", "smoke", WAIT="1")
    kernel = next(int(line.split()[1]) for line in process.stdout if line.startswith("kernel"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.strip() == "spklip reproduce: stopped; the same command goes on from here"
    for _ in range(50):
        try: os.kill(kernel, 0)
        except ProcessLookupError: return
        time.sleep(0.1)
    raise AssertionError("the kernel lives on")

def test_of_two_that_run_one_notebook_the_second_waits(project):
    first = spklip(project, "reproduce", "--preset", "smoke", WAIT="1")
    assert any(line.startswith("kernel") for line in first.stdout)
    second = spklip(project, "reproduce", "--preset", "smoke")
    assert next(line for line in second.stdout if "another" in line) == "04_train: another process runs it; waiting\n"
    first.send_signal(signal.SIGINT); first.communicate(timeout=30)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and "kernel" in out, err

# the report and what is left

def test_the_report_shows_what_is_there_and_names_what_is_not(tmp_path):
    part = report.Part("Table 9", "Is it < more?", "99_nine", ("nine", "lost"), ("picture",))
    rows = [tables.row("top-1", [90, 92], number("table1.spklip_top1"), "ours & theirs", note="a <b>"), tables.row("top-5", None, number("table1.spklip_top5"))]
    tables.Results("smoke", tmp_path).table("nine", rows)
    page = report.write_report("smoke", tmp_path, (part,)).read_text()
    assert "Is it &lt; more?" in page and "ours &amp; theirs" in page and "a &lt;b&gt;" in page and "<b>" not in page.split("<h2")[1]
    assert "1 needs data, 1 ours" in page and "91.00 ± 1.41" in page and "-0.15" in page
    assert "Not there: lost, picture" in page and "99_nine" in page
    tables.Results("smoke", tmp_path).table("lost", [dict(n=i, share=2e-5) for i in range(report.MOST + 3)])
    rows.append(tables.row("joules", 1.3754, number("table6.ann_total"))); tables.Results("smoke", tmp_path).table("nine", rows)
    page = report.write_report("smoke", tmp_path, (part,)).read_text()
    assert f"{report.MOST} of {report.MOST + 3} rows" in page and "<td>2e-05</td>" in page and "<td>1.375</td>" in page and "<td>+0.000</td>" in page

def test_every_part_of_the_report_has_its_notebook():
    there = {p.relative_to(ROOT/"nbs").with_suffix("").as_posix() for p in (ROOT/"nbs").rglob("*.ipynb")}
    made = {p.notebook for p in report.PARTS}
    assert {f for p in report.PARTS for f in p.figures} == set(report.CAPTIONS)
    assert made <= there and len({t for p in report.PARTS for t in p.tables}) == sum(len(p.tables) for p in report.PARTS)

def test_each_number_of_the_paper_stands_in_a_part():
    parts = " ".join(p.where for p in report.PARTS).lower()
    for n in NUMBERS.values():
        if n.where.startswith(("Table", "Figure")): assert n.where.split(",")[0].lower() in parts, n.where

def test_time_left_goes_by_the_pace_of_what_is_done():
    assert reproduce.left_over({"a": 20}, {"a": 10, "b": 60, "c": 5}, ["b", "c"]) == 130
    # of b nothing is known
    assert reproduce.left_over({"a": 20}, {"a": 10}, ["b"]) is None and reproduce.left_over({"a": 20}, {"a": 10, "c": 5}, ["b", "c"]) == 10
    assert reproduce.left_over({"a": 10, "b": 5}, {"a": 600, "b": 60, "c": 5}, ["c"]) == 5 # both were read from the cache
    assert reproduce.left_over({"a": 120, "b": 5}, {"a": 600, "b": 60, "c": 5}, ["c"]) == 1 # one of them, on a machine that is five times as fast

def test_a_step_that_fails_is_named_and_the_ones_before_it_are_kept(project):
    write(project/"nbs"/"05_other.ipynb", 'preset = "smoke"', "import os", "raise ValueError('no such light')")
    out, err = spklip(project, "reproduce", "--preset", "laptop").communicate(timeout=60)
    said = [line for line in err.splitlines() if line.startswith("spklip")] # a kernel that ends has something to say of sockets, now and then
    assert len(said) == 1 and "no such light" in said[0] and "papermill" not in err and "[2/2] 05_other" in out
    assert list(json.loads((project/"outputs"/"laptop"/"reproduce.json").read_text())) == ["04_train"]
