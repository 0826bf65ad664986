import errno
import os

import pytest
from tensorboard.compat.tensorflow_stub.io import gfile
from torch.utils.tensorboard import SummaryWriter

from moka_pl.cli.failures.log_writers import log_writers
from moka_pl.errors import system_failure


def test_a_full_disk_names_the_file_in_one_line(tmp_path, monkeypatch, capfd):
    def full(self, filename, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(writer):
        for step in range(100):
            writer.add_scalar("loss", 1.0, step)
            writer.flush()

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", full)
    with pytest.raises(OSError, match="No space left") as error, log_writers():
        write(SummaryWriter(tmp_path))
    assert system_failure(error.value).startswith(f"{tmp_path}/events.out.tfevents.")
    assert capfd.readouterr().err == ""
