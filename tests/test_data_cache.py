"""Tokenised rows on disk: read again while nothing changed, never stale, rebuilt where they are damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_templates import CHATML, family_tokenizer

from peftkit.data import DataConfig, cache, load, load_examples

ROWS = [{"prompt": f"What is {i} + 1?", "completion": f"{i + 1} " + "x" * (i % 40)} for i in range(300)]


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A file of rows, which are few, in a place where even few are kept."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(load, "SMALL", 0)
    monkeypatch.setattr(cache, "SMALL", 0)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "peftkit" / "tokenised").glob("*"))


def read(source: Path, tokenizer=None, **options):
    return load_examples(DataConfig(train=str(source), **options), tokenizer or family_tokenizer("chatml"), "train")


def in_memory(source: Path, **options):
    return read(source, cache=False, **options)[0]


def test_a_second_load_reads_what_the_first_kept(source, tmp_path, monkeypatch):
    examples, report = read(source, max_length=60)
    [file] = kept(tmp_path)
    assert any(f"tokenised rows are kept in {file}" in note for note in report.notes)
    assert report.dropped and report.kept == len(examples) < 300
    monkeypatch.setattr(load, "make", None)  # nothing can be tokenised now
    again, second = read(source, max_length=60)
    assert again == examples and [f"tokenised rows are read from {file}"] == second.notes[-1:]
    assert (second.dropped, second.rows, second.format, second.truncated) == (report.dropped, report.rows, report.format, report.truncated)
    assert second.notes[:-1] == report.notes[:-1] and list(second.lengths) == list(report.lengths) and second.supervised_tokens == report.supervised_tokens


def test_what_is_kept_is_what_would_be_made(source):
    for options in ({}, {"holdout": 0.1}, {"train_rows": 7}, {"max_length": 40, "truncation": "right"}):
        assert read(source, **options)[0] == read(source, **options)[0] == in_memory(source, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"loss_on": "all"}, {"max_length": 100}, {"truncation": "right"}, {"system": "Be kind."}, {"train_rows": 5}, {"holdout": 0.1},
        {"columns": {"completion": "prompt", "prompt": "completion"}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_option_is_another_file(source, tmp_path, change):
    read(source)
    examples, _ = read(source, **change)
    assert len(kept(tmp_path)) == 2 and examples == in_memory(source, **change)


def test_other_rows_template_tokenizer_or_code_are_another_file(source, tmp_path, monkeypatch):
    read(source)
    text, times = source.read_text(), source.stat()
    source.write_text(text.replace("What is 7 +", "What is 8 +"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # the trap: same size, same time, other rows
    assert source.stat().st_size == len(text)
    changed, _ = read(source)
    assert len(kept(tmp_path)) == 2 and "What is 8 +" in family_tokenizer("chatml").decode(changed[7].input_ids)
    other = family_tokenizer("chatml")
    other.chat_template = CHATML.replace("<|im_end|>\\n", "<|im_end|>")
    assert other.chat_template != CHATML and read(source, other)[0] != changed and len(kept(tmp_path)) == 3
    other = family_tokenizer("chatml")
    other.add_tokens(["What"])
    assert read(source, other)[0] != changed and len(kept(tmp_path)) == 4
    code = tmp_path / "render.py"
    code.write_text("# another way to render")
    monkeypatch.setattr(load, "RENDERING", [code])
    read(source)
    assert len(kept(tmp_path)) == 5


def test_a_template_that_writes_the_date_is_not_kept_over_midnight(source, tmp_path, monkeypatch):
    chat = family_tokenizer("chatml")
    chat.chat_template = "{{ strftime_now('%d') }}" + CHATML
    read(source, chat)

    class Tomorrow(load.date):
        @classmethod
        def today(cls):
            return cls(2999, 1, 1)

    monkeypatch.setattr(load, "date", Tomorrow)
    read(source, chat)
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["a byte", "half of it", "nothing left", "something else"])
def test_a_damaged_file_is_rebuilt_and_said(source, tmp_path, damage):
    examples, _ = read(source)
    [file] = kept(tmp_path)
    whole = file.read_bytes()
    broken = {
        "a byte": whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:],
        "half of it": whole[: len(whole) // 2],
        "nothing left": b"",
        "something else": b"?" * 999,
    }
    file.unlink()  # the table read above is mapped from it
    file.write_bytes(broken[damage])
    again, report = read(source)
    assert again == in_memory(source) == examples and file.read_bytes() == whole
    assert any(f"the cache file {file} could not be used" in note for note in report.notes) and any("tokenised anew" in note for note in report.notes)
    assert "read from" in read(source)[1].notes[-1]


def test_a_file_that_is_not_whole_has_not_the_name_that_is_looked_for(source, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_digest", killed)
    with pytest.raises(KeyboardInterrupt):
        read(source)
    assert kept(tmp_path) == []
    monkeypatch.undo()


def test_rows_that_change_while_they_are_read_are_not_kept(source, tmp_path, monkeypatch):
    make = load.make

    def change_first(which, tokenizer, store):
        source.write_text(source.read_text().replace("What is 7 +", "What is 77 +"))
        return make(which, tokenizer, store)

    monkeypatch.setattr(load, "make", change_first)
    read(source)
    assert kept(tmp_path) == []


def test_where_nothing_can_be_written_the_rows_stay_in_memory_and_it_is_said(source, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file, where a folder is needed")
    examples, report = read(source)
    assert examples == in_memory(source) and any("tokenised rows are not kept, because" in note for note in report.notes)


LOAD = """
import sys; sys.path.insert(0, sys.argv[2])
from chat_templates import family_tokenizer
from peftkit.data import DataConfig, cache, load, load_examples
cache.SMALL = load.SMALL = 0
examples, report = load_examples(DataConfig(train=sys.argv[1]), family_tokenizer('chatml'), 'train')
print(len(examples), examples.lengths.sum(), examples[299].answer, *report.notes[-1:] if sys.argv[3:] else [])
"""
ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent


def test_a_full_disk_costs_the_cache_not_the_run(source, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))" + LOAD  # no file can grow larger
    done = subprocess.run([sys.executable, "-c", limited, str(source), str(HERE), "notes"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("300 "), done.stderr
    assert "tokenised rows are not kept, because" in done.stdout and kept(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_once_it_is_old(source, tmp_path):
    folder = tmp_path / "home" / "peftkit" / "tokenised"
    folder.mkdir(parents=True)
    for name, age in (("old.arrow.x.part", 2 * cache.ABANDONED), ("new.arrow.x.part", 0)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    read(source)
    assert [file.name for file in kept(tmp_path) if file.suffix == ".part"] == ["new.arrow.x.part"]


def test_few_rows_and_built_in_ones_and_cache_false_leave_no_file(source, tmp_path, monkeypatch):
    read(source, cache=False)
    read(Path("builtin:tool-calls/train"))
    monkeypatch.undo()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    read(source)
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "env, folder",
    [({"HF_HOME": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b"), ({"HF_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"), ({}, str(Path.home() / ".cache"))],
)
def test_the_folder_follows_the_conventions(monkeypatch, env, folder):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(folder) / "peftkit" / "tokenised"


def test_writers_side_by_side(source, tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", LOAD, str(source), str(HERE)], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    told = {writer.communicate(timeout=120)[0] for writer in running}
    assert [writer.returncode for writer in running] == [0, 0, 0] and len(told) == 1
    assert len(kept(tmp_path)) == 1 and read(source)[0] == in_memory(source)
