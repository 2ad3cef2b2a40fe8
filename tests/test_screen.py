"""stdout and stderr that nobody reads any more, or that cannot show a letter: a run goes on, and its words are kept."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "import sys; from pathlib import Path; from rlhf.shell.screen import into, outlast; outlast(); "


def shell(folder: Path, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line for bash, in which $PY is this Python; it prints the exit code of each part of the last pipe."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PY": sys.executable, **variables}
    command = ["bash", "-c", f"exec 3> codes; {line}; echo ${{PIPESTATUS[@]}} >&3"]
    options = {"cwd": folder, "env": environment, "capture_output": True, "encoding": "utf-8"}
    return subprocess.run(command, timeout=100, check=False, **options)


def codes(folder: Path) -> list[int]:
    return [int(code) for code in (folder / "codes").read_text().split()]


def script(folder: Path, text: str) -> None:
    (folder / "script.py").write_text(BEGIN + text)


LINES = "into(Path('.'))\nfor n in range(5):\n    print('line', n, flush=True)\n    sys.stdin.readline()\n"
SLOWLY = "(sleep 0.3; echo; echo; echo; echo; echo) | $PY script.py"


def test_after_the_reader_of_a_pipe_is_gone_lines_go_to_a_file_which_is_said_where_somebody_reads(tmp_path):
    script(tmp_path, LINES)
    done = shell(tmp_path, f"{SLOWLY} | head -1")
    assert codes(tmp_path) == [0, 0, 0] and done.stdout == "line 0\n"
    kept = (tmp_path / "screen.txt").read_text().splitlines()
    assert kept[-2:] == ["line 3", "line 4"]
    assert done.stderr == "nothing more can be written to stdout (Broken pipe): the rest is in screen.txt\n"


def test_with_both_in_the_pipe_the_word_of_an_error_is_in_the_file(tmp_path):
    script(tmp_path, LINES + "sys.exit('what was wrong')\n")
    shell(tmp_path, f"{SLOWLY} 2>&1 | head -1")
    assert codes(tmp_path) == [0, 1, 0]
    assert (tmp_path / "screen.txt").read_text().endswith("line 4\nwhat was wrong\n")


def test_before_a_run_has_a_folder_what_nobody_reads_is_dropped_and_costs_no_exit_code(tmp_path):
    script(tmp_path, "print('x' * 10**6, flush=True); print('y', flush=True); into(Path('.')); print('z')\n")
    done = shell(tmp_path, "$PY script.py | head -c 1")
    assert codes(tmp_path) == [0, 0] and done.stdout == "x" and done.stderr == ""
    assert (tmp_path / "screen.txt").read_text().endswith("z\n")


def test_a_full_disk_behind_stdout_ends_nothing(tmp_path):
    script(tmp_path, "into(Path('.')); print('a', flush=True); print('b', flush=True)\n")
    done = shell(tmp_path, "$PY script.py > /dev/full")
    assert codes(tmp_path) == [0] and "(No space left on device): the rest is in screen.txt" in done.stderr


def test_streams_that_were_closed_from_the_start_are_nobody_s_and_no_file_takes_their_place(tmp_path):
    script(tmp_path, "f = open('data', 'w'); print('screen'); print('screen', file=sys.stderr); f.write('data')\n")
    shell(tmp_path, "$PY script.py <&- >&- 2>&-")
    assert codes(tmp_path) == [0] and (tmp_path / "data").read_text() == "data"


def test_in_a_locale_without_utf_8_paths_and_texts_are_utf_8_nevertheless(tmp_path):
    script(tmp_path, "Path('gr\\u00fc\\u00df').write_text('x'); print(sys.argv, sys.getfilesystemencoding())\n")
    done = shell(tmp_path, "$PY script.py ü", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert codes(tmp_path) == [0] and done.stdout == "['script.py', 'ü'] utf-8\n"
    assert (tmp_path / "grüß").exists()


def test_letters_that_a_terminal_cannot_show_are_escaped(tmp_path):
    script(tmp_path, "print('gr\\u00fc\\u00df', '\\u2192'); print('\\u00fc', file=sys.stderr)\n")
    done = shell(tmp_path, "$PY script.py", PYTHONIOENCODING="ascii")
    assert codes(tmp_path) == [0] and done.stdout == "gr\\xfc\\xdf \\u2192\n" and done.stderr == "\\xfc\n"


@pytest.mark.slow
def test_a_run_whose_pipe_is_closed_trains_to_its_end(tmp_path):
    small = "experiment=smoke model=micro transfer=local sft.steps=2 task.held_out=8 task.prompts=64 steps=2"
    command = f"$PY -W ignore -m rlhf.train {small} logger=[console,jsonl] hydra.run.dir=run"
    done = shell(tmp_path, f"{command} 2>&1 | head -1")
    assert codes(tmp_path) == [0, 0] and done.stdout.startswith("sort: 2 steps x 8 prompts")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert "next: python -m rlhf.report" in (tmp_path / "run" / "screen.txt").read_text()


def test_every_file_of_text_is_opened_in_an_encoding_that_is_named():
    """Else it is the locale's, which need not be that of whoever reads the file."""
    nameless = []
    for path in sorted([*ROOT.glob("rlhf/**/*.py"), *ROOT.glob("transfer/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _opens_text(node) and "encoding" not in [k.arg for k in node.keywords]:
                nameless.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert nameless == []


def _opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    texts = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    mode = next((text for text in texts if text and set(text) <= set("rwabxt+")), "")
    return name == "open" and "b" not in mode and (isinstance(call.func, ast.Name) or mode != "")


@pytest.mark.slow
def test_a_run_in_a_folder_with_an_umlaut_is_resumed_in_any_locale(tmp_path):
    folder = tmp_path / "grüße"
    folder.mkdir()
    small = (
        "experiment=smoke model=micro transfer=local sft.steps=2 task.held_out=8 task.prompts=64 logger=[console,jsonl]"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shell(folder, f"$PY -W ignore -m rlhf.train {small} steps=1 hydra.run.dir=run")
    assert codes(folder) == [0]
    done = shell(folder, f"$PY -W ignore -m rlhf.resume '{folder}/run' steps=2", **ascii_only)
    assert codes(folder) == [0] and "warning" not in done.stdout + done.stderr, done.stderr
    assert f"next: python -m rlhf.report '{folder}/run'" in done.stdout
