import json
import logging
from pathlib import Path

from transfer.agreement.journal import Journal


def test_each_event_is_a_line_with_its_writer_at_once(tmp_path):
    journal = Journal(tmp_path / "notes" / "worker-3.jsonl")
    journal.write("finish", version=7)
    (line,) = (tmp_path / "notes" / "worker-3.jsonl").read_text().splitlines()
    assert {"who": "worker-3", "op": "finish", "version": 7}.items() <= json.loads(line).items()
    journal.close()
    journal.write("finish", version=8)
    assert len((tmp_path / "notes" / "worker-3.jsonl").read_text().splitlines()) == 1


def test_a_disk_that_is_full_is_one_warning_and_stops_nothing(caplog):
    journal = Journal(Path("/dev/full"))
    with caplog.at_level(logging.WARNING, "transfer"):
        for version in range(3):
            journal.write("finish", version=version)
    journal.close()
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]
