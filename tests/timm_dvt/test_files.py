"""Claims about files that appear whole: also as Windows wants it."""

import fcntl
import os

from tests.helpers.folders import small_files
from timm_dvt.files import write_whole


def test_windows_syncs_what_may_be_written_alone_and_nothing_else_is_synced(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    small_files(tmp_path)
    write_whole(tmp_path / "a", lambda path: path.write_bytes(b"content"))
    assert len(modes) == 3 and os.O_RDONLY not in modes and (tmp_path / "a").read_bytes() == b"content"
