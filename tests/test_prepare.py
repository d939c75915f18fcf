"""`prepare`: the same bytes whoever makes them, nothing lost when it is killed, nothing half-written when the disk is full."""

from __future__ import annotations

import csv
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_cases import here_fixture, one_thread  # noqa: F401
from shard_cases import SETTINGS, content_of, expected, joined, prepared, write_jsonl

from lit_modules.data import sources
from lit_modules.data.prepare import Progress
from lit_modules.data.processes import unordered
from lit_modules.data.shards import INDEX, WORK, ShardedTokens, read_index
from lit_modules.data.verify import check_shards
from mixers.errors import ConfigError
from recipes.__main__ import main
from recipes.commands.prepare import overfull, progress_line

ROOT = Path(__file__).parents[1]
OPTIONS = ["--tokenizer=bytes", "--val_fraction=0.2", f"--shard_tokens={SETTINGS.shard_tokens}"]


def command(*arguments: str, **options) -> subprocess.Popen:
    """`python -m recipes prepare`, with units of 500 bytes."""
    code = (
        "import sys; from lit_modules.data import sources; sources.UNIT_BYTES = 500; from recipes.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    if "units" in options:
        code = code.replace("500", str(options.pop("units")))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, "prepare", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# --- processes ---


def test_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    source = write_jsonl(tmp_path)
    for workers in (0, 1, 2):
        index = prepared(tmp_path / f"out{workers}", source, workers=workers)
        assert content_of(index.folder) == content_of(tmp_path / "out0")
    assert len(index.splits["train"]) > 3
    for split, documents in expected().items():
        assert ShardedTokens(index, split)[:].tolist() == joined(documents)


@pytest.mark.fault("worker of `prepare` dies", "the process ends within a task", "nothing: one line says so")
def test_a_worker_that_is_killed() -> None:
    with pytest.raises(ConfigError, match="workers: a worker process was killed"):
        list(unordered(os._exit, range(4), 1))


def test_a_worker_s_error_is_raised(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 1}\n')
    for workers in (0, 1):
        with pytest.raises(ConfigError, match=r"source: .*a\.jsonl line at byte 14: 'text' is not a string but int"):
            prepared(tmp_path / "out", tmp_path / "a.jsonl", workers=workers)
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.fault(
    "`prepare` is killed",
    "SIGKILL before every change of a file in turn, and again in the process that goes on",
    "nothing: shards are the same bytes",
    each=20,
)
def test_killed_before_every_change_of_a_file(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path, 60)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = [sys.executable, str(ROOT / "tests/kill_prepare.py"), str(source), str(tmp_path)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 20
    assert all(same == "True" for *_, same in lines)
    assert all(killed == "True" for _, killed, *_ in lines[:-1])
    assert sum(again == "True" for _, _, again, *_ in lines) > len(lines) // 4
    assert any(int(left) for *_, left, _ in lines)


@pytest.mark.fault("`prepare` is killed", "SIGKILL at random times, with worker processes", "nothing: shards are the same bytes")
def test_killed_at_random_and_resumed(tmp_path: Path) -> None:
    """The real command with its workers."""
    source = write_jsonl(tmp_path, 3000)
    out, options = tmp_path / "out", {"units": 2000}
    arguments = (f"--source={source}", *OPTIONS, "--workers=2")
    kills = 0
    for _ in range(3):
        process = command(*arguments, f"--out={out}", **options)
        before = len([*out.glob(f"{WORK}/0*")])
        while process.poll() is None and len([*out.glob(f"{WORK}/0*")]) <= before + 2:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    assert kills
    time.sleep(0.1)  # the workers end with their parent
    done = command(*arguments, f"--out={out}", **options)
    said, error = done.communicate()
    assert done.returncode == 0, error
    assert "train: " in said
    whole = command(f"--source={source}", *OPTIONS, "--workers=0", f"--out={tmp_path / 'whole'}", **options)
    whole.communicate()
    names = set(content_of(tmp_path / "whole"))
    assert set(content_of(out)) == names
    for name in names - {INDEX}:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_index(out).splits == read_index(tmp_path / "whole").splits
    check_shards(read_index(out))


# --- what goes wrong ---


@pytest.mark.fault("disk full in `prepare`", "no file may be longer than a limit", "nothing: the same command goes on where there is room")
@pytest.mark.parametrize(("workers", "limit"), [(0, 1000), (1, 1000), (0, 2500)])
def test_disk_full(tmp_path: Path, workers: int, limit: int) -> None:
    """No file may be longer than the limit: that of a unit is, or that of a shard."""
    arguments = (f"--source={write_jsonl(tmp_path)}", f"--out={tmp_path / 'out'}", *OPTIONS, f"--workers={workers}")
    process = command(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, error = process.communicate()
    assert process.returncode == 2
    assert len(error.splitlines()) == 1, error
    assert "cannot be written: File too large; what is finished is kept: make room and give the same command again" in error
    left = {file.name for file in (tmp_path / "out").rglob("*")}
    assert INDEX not in left
    assert not any(name.endswith((".tmp", ".tokens")) for name in left)
    assert any(name.endswith(".part") for name in left) == (limit == 2500)
    again = command(*arguments)
    assert again.wait() == 0
    check_shards(read_index(tmp_path / "out"))


def test_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("")
    with pytest.raises(ConfigError, match=r"out: .* is not empty, and not a folder of `prepare`"):
        prepared(out, source)
    assert [file.name for file in out.iterdir()] == ["precious"]
    with pytest.raises(ConfigError, match=r"out: .*precious is a file; give a folder$"):
        prepared(out / "precious", source)
    with pytest.raises(ConfigError, match=r"out: .* cannot be written: Not a directory; mend that, or give another folder$"):
        prepared(out / "precious" / "out", source)


def test_another_source_or_setting(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path), tmp_path / "out"
    index = prepared(out, source)
    before = content_of(out)
    assert prepared(out, source) == index  # already complete
    with pytest.raises(ConfigError, match=r"out: .* was begun with another shard_tokens \(1500, not 7\); give another folder"):
        prepared(out, source, SETTINGS._replace(shard_tokens=7))
    source.write_text(source.read_text() + '{"text": "more"}\n')
    with pytest.raises(ConfigError, match="was begun with another source"):
        prepared(out, source)
    assert content_of(out) == before
    (out / WORK).mkdir()
    with (out / WORK / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="out: another process is preparing"):
            prepared(out, write_jsonl(tmp_path))


def test_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="source: it holds no documents"):
        prepared(tmp_path / "out", tmp_path / "a.txt")


# --- speed ---


def test_committed_figures() -> None:
    """Of tests/bench_data.py: at least 80 % of the bare tokenizer's speed on a core, and 500,000 tokens a second from one worker."""
    with (ROOT / "docs/benchmarks/data_cpu.csv").open() as table:
        rows = list(csv.DictReader(table))
    speeds = {(row["what"].split()[0].strip(","), row["impl"]): int(row["tokens_per_s"]) for row in rows}
    for package in ("tokenizers", "sentencepiece"):
        assert speeds[package, "prepare"] >= 0.8 * speeds[package, "bare"]
    assert speeds["loader", "1 workers"] >= 500_000
    assert all(row["cpu"] and row["versions"] and row["commit"] and row["date"] for row in rows)


# --- the command line ---


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    def refused(*arguments: str) -> str:
        assert main(["prepare", *arguments]) == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert not said.out
        return line

    return refused


FILE = ("--source=a.txt", "--tokenizer=bytes")
COMMANDS = {
    "no folder": ([], "error: out: must be set"),
    "no source": (["--out=o", "--tokenizer=bytes"], "error: source: must be set"),
    "no tokenizer": (["--out=o", "--source=a.txt"], "error: tokenizer: must be set"),
    "tokenizer": (["--out=o", "--source=a.txt", "--tokenizer=none"], "error: tokenizer: 'none' does not exist"),
    "source": (["--out=o", "--source=none.txt", "--tokenizer=bytes"], "error: source: none.txt does not exist"),
    "fraction": (["--out=o", "--val_fraction=1"], "error: val_fraction: must lie in [0, 1), got 1.0"),
    "no number": (["--out=o", "--workers=many"], "error: workers: invalid int value: 'many'"),
    "workers": (["--out=o", "--workers=-1"], "error: workers: must be at least 0, got -1"),
    "shards": (["--out=o", "--shard_tokens=0"], "error: shard_tokens: must be at least 1, got 0"),
    "unknown": (["--out=o", "--worker=1"], "did you mean 'workers'"),
    "nothing to check": (["--out=o", "--check"], "error: out: o has no shards.json"),
    "more than a check": (
        ["--out=o", "--check", "--workers=2", "--text_key=text"],
        "error: text_key: says nothing to --check, which reads the shards in --out; leave out --text_key, --workers",
    ),
    "split of files": ([*FILE, "--split=train", "--out=o"], "error: split: is of a dataset by name, but a.txt is of files here; leave it out"),
    "stream of files": (["--stream", "--out=o", "--tokenizer=bytes", "--source=*.txt"], "error: stream: is of a dataset by name, but *.txt is"),
    "subset of files": (["--subset=", "--out=o", "--tokenizer=bytes", "--source=."], "error: subset: is of a dataset by name, but . is of files"),
    "empty": ([*FILE, "--out="], "error: out: must be set"),
    "empty to check": (["--check", "--out="], "error: out: must be set"),
    "a file": ([*FILE, "--out=a.txt"], "error: out: a.txt is a file; give a folder"),
    "in a file": ([*FILE, "--out=a.txt/o"], "error: out: a.txt/o/.prepare cannot be written: Not a directory; mend that, or give another folder"),
    "long": ([*FILE, f"--out={'o' * 300}"], f"error: out: {'o' * 100}... (300 characters) cannot be looked up: File name too long"),
    "long source": (["--out=o", "--tokenizer=bytes", f"--source={'a' * 300}"], f"error: source: {'a' * 100}... (300 characters) cannot be"),
    "nobody's home": ([*FILE, "--out=~nobody-here/o"], "error: out: ~nobody-here/o cannot be looked up: Could not determine home directory"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command_refuses(case: str, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    arguments, words = COMMANDS[case]
    assert words in refused(*arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_command(refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [f"--source={write_jsonl(tmp_path)}", f"--out={out}", *OPTIONS, "--workers=0"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(["prepare", *arguments]) == 0
        said = capsys.readouterr().out.splitlines()
        train = read_index(out).total("train")
        assert f"train: {train.documents:,} documents, {train.tokens:,} tokens, {train.n_bytes:,} bytes of text in 1 shards" in said
        assert said[-1].startswith("note: shard_tokens: a shard ends with a unit of the source (about 32 MiB of text")
        assert said[-1].endswith(f"so with 1,500 the longest has {train.tokens:,} tokens")
    assert main(["prepare", "--check", f"--out={out}"]) == 0
    assert f"train-00000: {train.documents:,} documents, {train.tokens:,} tokens: good" in capsys.readouterr().out
    assert overfull(read_index(out)._replace(origin={"shard_tokens": train.tokens})) == []
    file = out / "train-00000.tokens"
    file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
    assert "train-00000.tokens does not have the checksum of its index: it was changed or is corrupt" in refused("--check", f"--out={out}")


def test_progress_line() -> None:
    line = progress_line(Progress(units=30, all_units=100, tokens=5_000_000, earlier_units=10, earlier_tokens=1_000_000), seconds=2000.0, workers=4)
    assert line == "30/100 units, 5,000,000 tokens; 2,000 tokens/s, 500 a worker; 1:56:40 left"


def test_train_on_shards(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a missing corpus over `prepare` to a training that resumes."""
    small = ["--config=small.yaml", "--data.path=data/shards", "--data.val_path=null", "--data.val_tokens=64"]
    assert main(["preflight", *small]) == 0
    hint = "python -m recipes prepare --source FILES_OR_DATASET --tokenizer bytes --out data/shards"
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert "data.path: data/shards does not exist" in note
    assert note.endswith(hint)
    assert main(["fit", *small]) == 2
    assert hint in capsys.readouterr().err
    source = write_jsonl(here)
    assert main(["prepare", f"--source={source}", "--out=data/shards", *OPTIONS, "--workers=0"]) == 0
    capsys.readouterr()
    assert main(["preflight", *small]) == 0
    assert "note" not in capsys.readouterr().out
    assert main(["fit", *small]) == 0
    (run,) = here.glob("runs/*/*")
    assert main(["fit", *small, f"--ckpt_path={run}/checkpoints/last.ckpt", "--model.max_tokens=320"]) == 0
    assert main(["validate", f"--ckpt_path={run}/checkpoints/last.ckpt"]) == 0
    (here / "data/shards" / INDEX).unlink()
    capsys.readouterr()
    assert main(["fit", *small]) == 2
    assert f"data/shards has no shards.json: remove that folder and prepare its shards again ({hint})" in capsys.readouterr().err
