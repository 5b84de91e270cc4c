"""Files that hold the state of a run."""

import numpy as np

from smartfrz.adapters.state_file import read_state, write_state


def test_a_path_with_a_tilde_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_state({"rows": np.arange(3)}, "~/state.npz")
    assert (tmp_path / "state.npz").is_file()
    assert read_state("~/state.npz")["rows"].tolist() == [0, 1, 2]
