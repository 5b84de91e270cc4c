import logging
import subprocess
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch")

from smartfrz.adapters.torch.cache.store import ActivationStore, Field, parse_bytes  # noqa: E402

PICTURE, TOKENS, MASK = Field((3, 4, 5), torch.float32), Field((16, 7), torch.float32), Field((6,), torch.bool)
ROW = 4 * 60


def pictures(*keys):
    """Rows that tell which key they belong to."""
    return torch.stack([torch.randn(PICTURE.shape, generator=torch.Generator().manual_seed(key)) for key in keys])


def store_of(memory=10**6, disk=0, fields=(PICTURE,), **options):
    return ActivationStore(fields, memory=memory, disk=disk, **options)


def put(store, *keys):
    return store.put(keys, [pictures(*keys)], keys)


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


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
    store = store_of(memory, disk, fields=(MASK, PICTURE))  # the second one begins at an odd place
    masks = torch.arange(60).reshape(10, 6) % 3 == 0
    assert store.put(range(10), [masks, pictures(*range(10))], range(10)) == 10
    chosen = [7, 0, 9, 7]
    mask, rows = store.get(chosen)
    assert_equal(rows, pictures(*chosen))
    assert_equal(mask, masks[chosen])
    assert_equal(store.get([3])[1], pictures(3))
    assert [key in store for key in (0, 9, 10)] == [True, True, False]
    with pytest.raises(KeyError):
        store.get([10])


def test_a_row_belongs_to_the_inputs_it_was_computed_from():
    store = store_of()
    store.put([1], [pictures(1)], [77])
    assert [store.has(1, 77), store.has(1, 78), store.has(2, 77)] == [True, False, False]


def test_memory_first_then_disk_then_nothing():
    store = store_of(3 * ROW + 1, 5 * ROW)
    assert put(store, *range(20)) == len(store) == 8
    assert (store.memory_bytes, store.disk_bytes) == (3 * ROW, 5 * ROW)
    assert_equal(store.get(range(8))[0], pictures(*range(8)))
    assert 8 not in store
    store.discard([0, 5])
    assert put(store, 30, 31, 32) == 2
    assert_equal(store.get([30, 7, 31])[0], pictures(30, 7, 31))


def test_the_file_grows_and_keeps_what_is_in_it():
    store = store_of(0, 10 * ROW, growth=4 * ROW)
    sizes = []
    for key in range(12):
        put(store, key)
        sizes.append(store.disk_bytes // ROW)
    assert sizes == [4] * 4 + [8] * 4 + [10] * 4
    assert_equal(store.get(range(10))[0], pictures(*range(10)))


def test_a_row_is_a_copy_both_ways():
    for store in (store_of(), store_of(0, 10**5)):
        rows = pictures(1)
        store.put([1], [rows], [0])
        rows.zero_()
        store.get([1])[0].zero_()
        assert_equal(store.get([1])[0], pictures(1))


ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("field", [PICTURE, TOKENS, Field((5,), torch.float32)])
def test_rounding_of_half_precision(dtype, field):
    store = store_of(fields=(field,), dtype=dtype)
    rows = torch.randn((4, *field.shape), generator=torch.Generator().manual_seed(0))
    assert store.put(range(4), [rows], range(4)) == 4
    (back,) = store.get(range(4))
    assert back.dtype == torch.float32
    assert store.row_bytes == rows[0].nbytes // 2
    torch.testing.assert_close(back, rows, rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bits_of_bfloat16_and_integers_are_kept(dtype):
    bits = (torch.arange(8, dtype=torch.int16).reshape(2, 4) + 0x3F80).view(torch.bfloat16)
    numbers = torch.arange(8).reshape(2, 4)
    store = store_of(fields=(Field((4,), torch.bfloat16), Field((4,), torch.int64)), dtype=dtype)
    store.put([0, 1], [bits, numbers], [0, 1])
    back = store.get([0, 1])
    assert_equal(back[1], numbers)
    assert_equal(back[0], bits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e5])
def test_what_a_dtype_cannot_represent_is_not_kept(dtype, value):
    rows = pictures(0, 1)
    rows[0, 0, 0, 0] = value
    store = store_of(dtype=dtype)
    fits = value == 1e5 and dtype != "float16"
    assert store.put([0, 1], [rows], [0, 1]) == 1 + fits
    assert (0 in store) == fits
    assert 1 in store


def test_numbers_without_a_shape_and_rows_without_values():
    store = store_of(fields=(Field((), torch.float32), Field((0, 3), torch.float32)), dtype="float16")
    numbers = torch.tensor([0.1, 0.2])
    assert store.put([0, 1], [numbers, torch.empty(2, 0, 3)], [0, 1]) == 2
    number, empty = store.get([1, 0])
    assert_equal(number, numbers[[1, 0]])
    assert empty.shape == (2, 0, 3)


def test_temporary_files_have_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = store_of(0, 10**6)
    put(store, 1, 2)
    assert store.disk_bytes
    assert list(tmp_path.iterdir()) == []


def child(code, **options):
    """A Python process that knows the names of this test."""
    start = """
        import torch
        from smartfrz.adapters.torch.cache.store import ActivationStore, Field
        field, row = Field((3, 4, 5), torch.float32), 240
        ones = lambda n: [torch.ones(n, 3, 4, 5)]
    """
    text = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, **options)


def test_a_full_disk_stops_the_keeping_and_nothing_else():
    """The system refuses to let the file grow: a limit on the size of files stands for the full disk."""
    result = child("""
        import logging, resource
        logging.basicConfig()
        store = ActivationStore([field], memory=0, disk=10**6, growth=4 * row)
        store.put(range(4), ones(4), range(4))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * row, 2 * row))
        print(store.put(range(4, 9), ones(5), range(5)), len(store), store.disk_is_full, store.get([3])[0].sum().item())
        print(store.put([9], ones(1), [9]), store.disk_bytes == 4 * row)
    """)
    assert result.stdout.split("\n")[:2] == ["0 4 True 60.0", "0 True"], result.stderr
    assert result.stderr.count("gets no more room in") == 1


def test_without_a_full_disk_nothing_is_said(caplog):
    caplog.set_level(logging.INFO)
    put(store_of(0, 10 * ROW), *range(30))
    assert caplog.text == ""
