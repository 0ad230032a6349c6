"""`--progress json`: lines for programs while a prompt is read."""

import json

from json_document import PAGE, Document
from test_cli import cptool

from cptool.cli import progress, progress_lines
from cptool.distributed.status_board import Board, Work

HEADING = "Lines of --progress json"


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_line_for_each_chunk_and_second(monkeypatch, capfd):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    board, lines = Board(1), progress_lines.Lines()
    lines.watch(board)
    assert capfd.readouterr().err == ""
    shares = ((0, 0.01), (0, 0.1), (1, 0.2), (1, 0.2), (1, 0.5))
    for step, (chunk, share) in enumerate(shares):
        now = 100.0 + 0.3 * step
        work = Work(
            tokens=900,
            began=90.0,
            share=share,
            done=300 * chunk,
            chunk=chunk,
            chunks=3,
            variant="pass-q",
            memory=5,
        )
        board.write(0, "prefill, layer", 1, 4, work=work)
        lines.watch(board)
    found = lines_of(capfd.readouterr().err)
    assert [line["chunk"] for line in found] == [1, 2]
    first, second = found
    assert first["seconds_left"] is None and first["tokens_done"] == 0
    assert second["tokens_done"] == 300 and second["seconds_left"] > 0
    now = 101.7
    lines.watch(board)
    (third,) = lines_of(capfd.readouterr().err)
    assert third["share"] == 0.5 and (third["chunks"], third["memory_bytes"]) == (3, 5)


def test_commands_write_what_is_documented(mqa_path, tmp_path):
    document = Document(PAGE.read_text())
    options = ("--chunk", 150, "--progress", "json", "--cp", 2)
    told = cptool("generate", mqa_path, "--synthetic", 1900, "-n", 1, *options, "--json")
    found = lines_of(told.stderr)
    assert all(not document.check(line, HEADING) for line in found)
    assert not document.unprinted() & {(HEADING, name) for name in document.fields(HEADING)}
    chunks = [line["chunk"] for line in found]
    # Of chunks that take less than a tenth of a second, some are passed over.
    assert chunks == sorted(chunks) and len({*chunks}) > 1 and chunks[-1] == 13
    assert all(line["tokens_done"] == 150 * (line["chunk"] - 1) for line in found[:-1])
    assert all(line["tokens"] == 1900 and line["memory_bytes"] > 1e7 for line in found)
    assert (found[-1]["tokens_done"], found[-1]["share"]) == (1900, 1.0)
    shares = [line["share"] for line in found]
    assert shares == sorted(shares)
    (tmp_path / "p.jsonl").write_text('{"token_ids": [1]}')
    asked = ("generate", mqa_path, "--batch-file", tmp_path / "p.jsonl", "--progress", "json")
    assert "--progress json does not go with --batch-file" in cptool(*asked, code=2).stderr
