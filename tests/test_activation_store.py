import logging
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from smartfrz.adapters.torch.cache.store import ActivationStore, Budget, CacheFolder, Field, parse_bytes
from smartfrz.errors import UsageError

PICTURE, TOKENS, MASK = Field((3, 4, 5), "float32"), Field((16, 7), "float32"), Field((6,), "bool")
ROW = 4 * 60


def pictures(*keys):
    """Rows that tell which key they belong to."""
    return np.stack([np.random.default_rng(key).normal(size=PICTURE.shape).astype(np.float32) for key in keys])


def store_of(memory=10**6, disk=0, fields=(PICTURE,), **options):
    return ActivationStore(fields, Budget(memory, disk), **options)


def put(store, *keys):
    return store.put(keys, [pictures(*keys)], keys)


@pytest.mark.parametrize(
    ("text", "number"), [("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("512MiB", 2**29), ("7", 7), (0, 0), (12, 12)]
)
def test_numbers_of_bytes(text, number):
    assert parse_bytes(text, "memory") == number


@pytest.mark.parametrize("text", ["2 apples", "GB", -1, 1.5, None, True])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ValueError, match=r"`disk` is .*expected a number of bytes, or text such as \"2GB\""):
        parse_bytes(text, "disk")


@pytest.mark.parametrize(("memory", "disk"), [(10**6, 0), (0, 10**6), (3 * ROW, 10**6)])
def test_rows_come_back_bit_for_bit_in_any_order(memory, disk):
    store = store_of(memory, disk, fields=(PICTURE, MASK))
    masks = np.arange(60).reshape(10, 6) % 3 == 0
    assert store.put(range(10), [pictures(*range(10)), masks], range(10)) == 10
    chosen = [7, 0, 9, 7]
    rows, mask = store.get(chosen)
    np.testing.assert_array_equal(rows, pictures(*chosen), strict=True)
    np.testing.assert_array_equal(mask, masks[chosen], strict=True)
    assert [key in store for key in (0, 9, 10)] == [True, True, False]
    with pytest.raises(KeyError):
        store.get([10])


def test_memory_first_then_disk_then_nothing():
    store = store_of(3 * ROW + 1, 5 * ROW)
    assert put(store, *range(20)) == len(store) == 8
    assert (store.memory_bytes, store.disk_bytes) == (3 * ROW, 5 * ROW)
    np.testing.assert_array_equal(store.get(range(8))[0], pictures(*range(8)))
    assert 8 not in store
    store.discard([0, 5])
    assert put(store, 30, 31, 32) == 2
    np.testing.assert_array_equal(store.get([30, 7, 31])[0], pictures(30, 7, 31))
    store.clear()
    assert (len(store), store.budget.memory, store.budget.disk) == (0, 3 * ROW + 1, 5 * ROW)


def test_a_row_is_a_copy_both_ways():
    store = store_of()
    rows = pictures(1)
    store.put([1], [rows], [0])
    rows[:] = 0
    store.get([1])[0][:] = 0
    np.testing.assert_array_equal(store.get([1])[0], pictures(1))


def test_two_stores_share_a_budget():
    first = store_of(2 * ROW)
    put(first, 1, 2)
    second = ActivationStore([PICTURE], first.budget)
    assert put(second, 3) == 0
    first.discard([1])
    assert put(second, 3) == 1


ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("field", [PICTURE, TOKENS, Field((5,), "float32")])
def test_rounding_of_half_precision(dtype, field):
    store = store_of(fields=(field,), dtype=dtype)
    rows = np.random.default_rng(0).normal(size=(4, *field.shape)).astype(np.float32)
    assert store.put(range(4), [rows], range(4)) == 4
    (back,) = store.get(range(4))
    assert back.dtype == np.float32
    assert store.row_bytes == rows[0].nbytes // 2
    np.testing.assert_allclose(back, rows, rtol=ROUNDING[dtype], atol=1e-7)


def test_bfloat16_rounds_as_pytorch_does():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32) * 10.0 ** np.arange(-20, 30).repeat(2)
    values = values.astype(np.float32)
    store = store_of(fields=(Field((100,), "float32"),), dtype="bfloat16")
    store.put(range(3), [values], range(3))
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(store.get(range(3))[0], expected)


def test_int8_of_channels_that_are_too_small_for_it_is_float16():
    assert [store_of(fields=(Field((5, 3, size), "float32"),), dtype="int8").row_bytes for size in (2, 3)] == [60, 85]


@given(arrays.arrays(np.float32, (2, 3, 5, 2), elements=st.floats(-1e6, 1e6, width=32)))
def test_int8_errs_by_half_a_step_of_its_channel(rows):
    store = store_of(fields=(Field((3, 5, 2), "float32"),), dtype="int8")
    assert store.put([0, 1], [rows], [0, 1]) == 2
    span = rows.max((2, 3), keepdims=True) - rows.min((2, 3), keepdims=True)
    largest = np.abs(rows).max((2, 3), keepdims=True)
    assert (np.abs(store.get([0, 1])[0] - rows) <= span / 255 * 0.51 + largest * 1e-6).all()


def test_int8_has_a_scale_for_each_feature_of_tokens():
    rows = np.random.default_rng(0).normal(size=(2, *TOKENS.shape)).astype(np.float32)
    rows[..., 2] *= 1000  # the outlier features of transformers must not coarsen the others
    store = store_of(fields=(TOKENS,), dtype="int8")
    store.put([0, 1], [rows], [0, 1])
    error = np.abs(store.get([0, 1])[0] - rows)
    assert error[..., 2].max() > 1
    assert np.delete(error, 2, axis=2).max() < 0.02


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_bits_of_bfloat16_and_integers_are_kept(dtype):
    bits = np.arange(8, dtype=np.uint16).reshape(2, 4) + 0x3F80
    numbers = np.arange(8).reshape(2, 4)
    store = store_of(fields=(Field((4,), "bfloat16"), Field((4,), "int64")), dtype=dtype)
    store.put([0, 1], [bits, numbers], [0, 1])
    back = store.get([0, 1])
    np.testing.assert_array_equal(back[1], numbers, strict=True)
    np.testing.assert_array_equal(back[0], bits, strict=True)  # int8 would spare nothing in so few values


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.inf, np.nan, 1e5])
def test_what_a_dtype_cannot_represent_is_not_kept(dtype, value):
    rows = pictures(0, 1)
    rows[0, 0, 0, 0] = value
    store = store_of(dtype=dtype)
    fits = value == 1e5 and dtype != "float16"
    assert store.put([0, 1], [rows], [0, 1]) == 1 + fits
    assert (0 in store) == fits
    assert 1 in store


def test_an_unknown_dtype():
    with pytest.raises(ValueError, match="`dtype` is 'int4'; expected one of float32, float16, bfloat16, int8"):
        store_of(dtype="int4")


def test_temporary_files_have_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = store_of(0, 10**6)
    put(store, 1, 2)
    assert store.disk_bytes
    assert list(tmp_path.iterdir()) == []


# Folders


def folder_store(folder, identity="a", **options):
    return store_of(0, 10**5, folder=folder, identity={"model": identity}, slab_bytes=4 * ROW, **options)


def test_a_later_process_takes_over_what_was_flushed(tmp_path):
    folder = CacheFolder(tmp_path)
    store = folder_store(folder)
    put(store, *range(10))
    store.flush()
    put(store, 50)  # never flushed: it is not to be trusted
    folder.close()
    folder = CacheFolder(tmp_path)
    again = folder_store(folder)
    assert len(again) == 10
    assert 50 not in again
    assert again.fingerprints == {key: key for key in range(10)}
    np.testing.assert_array_equal(again.get([9, 3])[0], pictures(9, 3))
    assert put(again, *range(20, 30)) == 10
    np.testing.assert_array_equal(again.get([*range(10), *range(20, 30)])[0], pictures(*range(10), *range(20, 30)))
    folder.close()


@pytest.mark.parametrize("change", [{"identity": "b"}, {"dtype": "float16"}, {"fields": (TOKENS,)}])
def test_what_is_of_another_identity_is_not_used_and_is_swept_away(tmp_path, change):
    folder = CacheFolder(tmp_path)
    store = folder_store(folder)
    put(store, *range(10))
    store.flush()
    other = folder_store(folder, **change)
    assert len(other) == 0
    (tmp_path / "mine.txt").write_text("not of the cache")
    folder.sweep([other.name])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lock", "mine.txt"]
    folder.close()


def test_a_row_that_was_overwritten_since_is_not_believed(tmp_path):
    folder = CacheFolder(tmp_path)
    store = folder_store(folder)
    put(store, 1, 2, 3)
    store.flush()
    store.discard([2])
    put(store, 77)  # takes the place of 2, and is in no index
    again = folder_store(folder)
    assert [key in again for key in (1, 2, 3, 77)] == [True, False, True, False]
    np.testing.assert_array_equal(again.get([1, 3])[0], pictures(1, 3))
    folder.close()


@pytest.mark.parametrize("damage", ["index", "short file", "no file"])
def test_damaged_files_are_left_alone(tmp_path, damage, caplog):
    folder = CacheFolder(tmp_path)
    store = folder_store(folder)
    put(store, *range(3))
    store.flush()
    (index,), (rows,) = tmp_path.glob("*.npz"), tmp_path.glob("*.rows")
    if damage == "index":
        index.write_bytes(index.read_bytes()[:-50])
    elif damage == "short file":
        os.truncate(rows, 100)
    else:
        rows.unlink()
    again = folder_store(folder)
    assert len(again) == 0
    assert put(again, 4) == 1
    assert ("cannot be used again" in caplog.text) == (damage != "no file")
    folder.close()


def child(code, **options):
    """A Python process that knows the names of this test."""
    start = """
        import sys, os, signal, numpy as np
        from smartfrz.adapters.torch.cache.store import ActivationStore, Budget, CacheFolder, Field
        field, row = Field((3, 4, 5), "float32"), 240
        ones = lambda n: [np.ones((n, 3, 4, 5), np.float32)]
    """
    text = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, **options)


def test_two_processes_on_one_folder(tmp_path):
    folder = CacheFolder(tmp_path)
    result = child(f"CacheFolder({str(tmp_path)!r})")
    assert result.returncode == 1
    assert f"in use by process {os.getpid()}; expected a folder of this run alone" in result.stderr
    with pytest.raises(UsageError, match="in use by process"):
        CacheFolder(tmp_path)
    folder.close()
    assert child(f"CacheFolder({str(tmp_path)!r})").returncode == 0


def test_a_killed_process_leaves_a_folder_that_can_be_used(tmp_path):
    result = child(f"""
        store = ActivationStore([field], Budget(0, 10**5), folder=CacheFolder({str(tmp_path)!r}), identity={{"of": 1}})
        store.put(range(5), ones(5), range(5))
        store.flush()
        store.put(range(3, 9), [2 * rows for rows in ones(6)], range(6))  # overwrites two rows
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert result.returncode == -signal.SIGKILL
    folder = CacheFolder(tmp_path)
    store = store_of(0, 10**5, folder=folder, identity={"of": 1})
    assert [key in store for key in range(9)] == [True] * 3 + [False] * 6
    np.testing.assert_array_equal(store.get([0, 1, 2])[0], np.ones((3, 3, 4, 5), np.float32))
    folder.close()


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_stops_the_keeping_and_nothing_else(tmp_path, named):
    """The system refuses the second file: a limit on the size of files stands for the full disk."""
    folder = f"folder=CacheFolder({str(tmp_path)!r}), identity={{}}, " if named else ""
    result = child(f"""
        import logging, resource
        logging.basicConfig()
        store = ActivationStore([field], Budget(0, 10**6), {folder}slab_bytes=4 * row)
        store.put(range(4), ones(4), range(4))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * row, 2 * row))
        print(store.put(range(4, 9), ones(5), range(5)), len(store), store.disk_is_full, store.get([3])[0].sum())
        print(store.put([9], ones(1), [9]), store.budget.disk == 10**6 - 4 * row)
    """)
    assert result.stdout.split("\n")[:2] == ["0 4 True 60.0", "0 True"], result.stderr
    assert result.stderr.count("gets no more room in") == 1
    assert len(list(tmp_path.glob("*.rows"))) == (1 if named else 0)


def test_without_a_full_disk_nothing_is_said(caplog):
    caplog.set_level(logging.INFO)
    put(store_of(0, 10 * ROW), *range(30))
    assert caplog.text == ""
