import contextlib
import errno
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.core.errors import CapacityError, ConfigError, InputError, StorageError
from apt_model.vgpu import disk_files
from apt_model.vgpu.disk import DiskStore

ROOT = Path(__file__).parents[2]
CHUNK = 8192
SIZES = [0, 1, 63, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 4097]


def memory(size, shift=0):
    """Bytes whose address is `shift` past a multiple of 4096."""
    whole = torch.zeros(size + 2 * 4096, dtype=torch.uint8)
    start = -whole.data_ptr() % 4096 + shift
    return whole[start : start + size]


def filled(size, seed=0, shift=0):
    data = memory(size, shift)
    return data.copy_(torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def read(store, key, **options):
    out = memory(store.nbytes(key))
    store.read(key, out, **options)
    return out


def files(store):
    return sorted(path.name for path in store.folder.glob("*.blob"))


def threads():
    return [each for each in threading.enumerate() if each.name.startswith("apt-disk")]


@pytest.fixture
def store(tmp_path):
    with DiskStore(tmp_path / "store", 1 << 22, threads=3, chunk=CHUNK) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not threads()


@given(
    size=st.sampled_from(SIZES) | st.integers(1, 4 * CHUNK),
    shift=st.sampled_from([0, 1, 64]),
    out=st.tuples(st.sampled_from([0, 1, 5000]), st.sampled_from([0, 3, 512])),
    key=st.text(),
    verify=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_bytes_come_back_and_none_behind_them_is_touched(size, shift, out, key, verify):
    data = filled(size, size, shift)
    with DiskStore(None, 1 << 20, threads=2, chunk=CHUNK) as store:
        store.write(key, data)
        out = memory(size + out[0], out[1]).fill_(0xA5)
        store.read(key, out, verify=verify)
        assert torch.equal(out[:size], data)
        assert (out[size:] == 0xA5).all()
        assert list(store) == [key]
        assert store.nbytes(key) == size
        assert store.used == disk_files.padded(size) == store.place_of(key)[0].stat().st_size
        store.verify()


def test_o_direct_is_used(tmp_path, monkeypatch, caplog):
    flags = []
    opened = os.open

    def spy(path, flag, *rest, **options):
        if str(path).endswith(".blob"):
            flags.append(flag)
        return opened(path, flag, *rest, **options)

    monkeypatch.setattr(os, "open", spy)
    with DiskStore(tmp_path, 1 << 20, chunk=CHUNK) as store:
        store.write("a", filled(3 * CHUNK + 5))
        read(store, "a")
    if caplog.records:
        pytest.skip(f"the file system of {tmp_path} takes no O_DIRECT")
    # Allocated, written, read, synced.
    assert [bool(each & os.O_DIRECT) for each in flags] == [False, True, True, False]


def test_aligned_memory_is_read_in_place_in_one_call(store, monkeypatch):
    data = filled(CHUNK - 1)
    store.write("a", data)
    out = memory(CHUNK - 1)
    seen = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *call: seen.append(call[1]) or preadv(*call))
    store.read("a", out)
    ((body, tail),) = seen
    assert disk_files._address(body) == out.data_ptr()
    assert (len(body), len(tail)) == (4096, 4096)
    assert torch.equal(out, data)


def test_overwrite_delete_and_figures(store):
    store.write("a", filled(5000, 1))
    first = store.place_of("a")[0]
    store.write("b/../\udc80", filled(10, 2))
    store.write("a", filled(9000, 3))
    assert not first.exists()
    assert torch.equal(read(store, "a"), filled(9000, 3))
    assert (store.used, store.peak) == (12288 + 4096, 8192 + 4096 + 12288)
    assert (len(store), "a" in store, "c" in store, len(files(store))) == (2, True, False, 2)
    assert (store.bytes_written, store.bytes_read) == (14010, 9000)
    assert 0 < store.seconds_reading < 60
    store.delete("a")
    assert (store.used, list(store), len(files(store))) == (4096, ["b/../\udc80"], 1)
    for call in (store.delete, store.nbytes, store.place_of, lambda key: store.read(key, memory(1))):
        with pytest.raises(StorageError, match="holds no blob 'a'"):
            call("a")


def test_the_cap_is_hard(tmp_path):
    with DiskStore(tmp_path, 3 * 4096, chunk=CHUNK) as store:
        store.write("a", filled(4097, 1))
        with pytest.raises(CapacityError, match=r"'b' takes 8192 bytes .* 12288 .* 8192 are in use[^$]*16384"):
            store.write("b", filled(4097))
        with pytest.raises(CapacityError, match="the key keeps its blob"):
            store.write("a", filled(8192))
        assert (store.used, store.peak, len(files(store))) == (8192, 8192, 1)
        store.write("b", filled(4096))
        assert torch.equal(read(store, "a"), filled(4097, 1))
    with pytest.raises(CapacityError, match="holds 12288 bytes, and the capacity is 4096"):
        DiskStore(tmp_path, 4096)


def test_what_the_calls_do_not_take(store):
    store.write("a", filled(100))
    for wrong in (
        torch.zeros(4),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.uint8, device="meta"),
    ):
        with pytest.raises(InputError, match=r"data must be torch\.uint8"):
            store.write("b", wrong)
        with pytest.raises(InputError, match=r"out must be torch\.uint8"):
            store.read("a", wrong)
    with pytest.raises(InputError, match="contiguous"):
        store.read("a", torch.zeros(400, dtype=torch.uint8)[::2])
    with pytest.raises(InputError, match="has 100 bytes, and out has room for 99"):
        store.read("a", memory(99))
    for options in ({"threads": 0}, {"chunk": 100}, {"chunk": 0}, {"capacity": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DiskStore(None, **{"capacity": 1, **options})


def test_a_folder_is_opened_again(tmp_path):
    with DiskStore(tmp_path, 1 << 20, chunk=CHUNK) as store:
        for size in SIZES:
            store.write(f"k{size}", filled(size, size))
    # Another chunk size, and what a kill leaves behind: a blob that no index names and a half-written index.
    (tmp_path / "00000099.blob").write_bytes(bytes(4096))
    (tmp_path / ".partial-index.json-1").touch()
    (tmp_path / "notes.txt").touch()
    with DiskStore(tmp_path, 1 << 20, chunk=4 * CHUNK) as store:
        assert {path.name for path in tmp_path.iterdir()} == {*files(store), "index.json", "lock", "notes.txt"}
        assert len(files(store)) == len(store) == len(SIZES)
        for size in SIZES:
            assert torch.equal(read(store, f"k{size}"), filled(size, size))
        before = (tmp_path / "index.json").stat().st_mtime_ns
    assert (tmp_path / "index.json").stat().st_mtime_ns == before
    with DiskStore(tmp_path, 1 << 20) as store:
        store.write("new", filled(10))
        store.delete("k1")
        store.flush()
        index = json.loads((tmp_path / "index.json").read_text())
        assert set(index["blobs"]) == set(store)
        assert len(set(files(store))) == len(store)


def test_a_temporary_folder_goes_with_the_store_or_the_process(tmp_path):
    store = DiskStore(None, 1 << 20)
    store.write("a", filled(10))
    assert store.folder.exists()
    store.close()
    store.close()
    assert not store.folder.exists()
    script = (
        "import torch\nfrom apt_model.vgpu.disk import DiskStore\n"
        "store = DiskStore(None, 1 << 20)\nstore.write('a', torch.zeros(9, dtype=torch.uint8))\nprint(store.folder)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert ran.stdout.startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert not ran.stderr


def test_a_fork_leaves_the_folder_to_its_parent(tmp_path):
    store = DiskStore(None, 1 << 20)
    release = store._release.peek()
    disk_files.release_folder(*release[2][:2], os.getpid() + 1)
    assert store.folder.exists()
    store.close()


def test_one_store_a_folder(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom apt_model.vgpu.disk import DiskStore\n"
        "store = DiskStore(Path(sys.argv[1]), 1 << 20)\nprint('open', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "open\n"
    with pytest.raises(StorageError, match=rf"{tmp_path} is in use by a store of process {other.pid}"):
        DiskStore(tmp_path, 1 << 20)
    other.communicate()
    with DiskStore(tmp_path, 1 << 20), pytest.raises(StorageError, match=f"process {os.getpid()}"):
        DiskStore(tmp_path, 1 << 20)
    DiskStore(tmp_path, 1 << 20).close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot hold a store"):
        DiskStore(tmp_path / "file", 1)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "fstat"])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_the_old_blob(store, monkeypatch, call, old):
    if old:
        store.write("a", filled(5000, 1))
    before = (files(store), store.used)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match=r"blob 'a' in .*\.blob, offset 0: No space left"):
            store.write("a", filled(3 * CHUNK))
    assert (files(store), store.used) == before
    assert ("a" in store) == old
    if old:
        assert torch.equal(read(store, "a"), filled(5000, 1))
    assert not open_blobs()


def test_a_write_that_breaks_in_the_middle(store, monkeypatch):
    store.write("a", filled(5000, 1))
    pwritev = os.pwritev

    def broken(descriptor, buffers, offset):
        if offset >= 2 * CHUNK:
            raise OSError(errno.EIO, "the disk is gone")
        return pwritev(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(StorageError, match="offset 16384: the disk is gone"):
        store.write("a", filled(2 * CHUNK + 1))
    assert len(files(store)) == 1
    assert torch.equal(read(store, "a"), filled(5000, 1))


@pytest.mark.parametrize("where", ["open", "call"])
def test_buffered_where_o_direct_is_refused(tmp_path, monkeypatch, caplog, where):
    monkeypatch.setattr(disk_files.DirectFile, "_told", False)
    caplog.set_level(logging.INFO)
    opened, preadv, pwritev = os.open, os.preadv, os.pwritev
    refusal = OSError(errno.EINVAL, "Invalid argument")

    def refuse_open(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise refusal
        return opened(path, flags, *rest, **options)

    def refuse(call):
        def refusing(descriptor, buffers, offset):
            if disk_files.fcntl.fcntl(descriptor, disk_files.fcntl.F_GETFL) & os.O_DIRECT:
                raise refusal
            return call(descriptor, buffers, offset)

        return refusing

    if where == "open":
        monkeypatch.setattr(os, "open", refuse_open)
    else:
        monkeypatch.setattr(os, "preadv", refuse(preadv))
        monkeypatch.setattr(os, "pwritev", refuse(pwritev))
    with DiskStore(tmp_path, 1 << 20, chunk=CHUNK) as store:
        for size, shift in ((3 * CHUNK + 7, 0), (5000, 1)):
            store.write("a", filled(size, 4, shift))
            assert torch.equal(read(store, "a"), filled(size, 4))
    assert len([each for each in caplog.records if "O_DIRECT" in each.message]) == 1


def open_blobs():
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += [each] * str(each.readlink()).removesuffix(" (deleted)").endswith(".blob")
    return found


@pytest.mark.parametrize("size", [3 * CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("left", [0, 100, 4096, CHUNK + 1, 3 * CHUNK - 1])
@pytest.mark.parametrize("late", [True, False])
def test_a_truncated_file(store, monkeypatch, size, left, late):
    store.write("a", filled(size))
    path = store.place_of("a")[0]
    whole = path.stat()
    os.truncate(path, left)
    if late:  # as if it happened after the file was opened
        monkeypatch.setattr(os, "fstat", lambda _: whole)
    with pytest.raises(
        StorageError, match=rf"blob 'a' in {path}, offset \d+: .*(has {left} bytes|truncated)"
    ) as caught:
        read(store, "a", verify=False)
    assert f"offset {left}:" in str(caught.value) or late
    assert not open_blobs()


@pytest.mark.parametrize("where", [0, CHUNK + 17, 2 * CHUNK + 4])
def test_a_flipped_byte(store, where):
    data = filled(2 * CHUNK + 5)
    store.write("a", data)
    path = store.place_of("a")[0]
    with path.open("r+b") as file:
        file.seek(where)
        file.write(bytes([data[where].item() ^ 1]))
    handle = store.read_async("a", memory(len(data)))
    for call in (handle.wait, handle.result, store.verify):
        with pytest.raises(
            StorageError, match=rf"'a' in {path}: .* from offset {where // CHUNK * CHUNK} on are altered"
        ):
            call()
    assert not torch.equal(read(store, "a", verify=False), data)


def test_a_missing_file(store):
    store.write("a", filled(10))
    path = store.place_of("a")[0]
    path.unlink()
    handle = store.read_async("a", memory(10))
    assert handle.done()
    for call in (handle.wait, store.flush):
        with pytest.raises(StorageError, match=rf"blob 'a' in {path}, offset 0: No such file"):
            call()
    store.delete("a")


def test_an_error_in_the_block_is_not_hidden_by_one_in_closing(tmp_path, caplog):
    def use(*, fail):
        with DiskStore(tmp_path, 1 << 20) as store:
            store.write("a", filled(10))
            store.place_of("a")[0].unlink()
            if fail:
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        use(fail=True)
    assert "blob 'a' in" in caplog.text
    with pytest.raises(StorageError, match="blob 'a' in"):
        use(fail=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "offset 0: No such file"),
        (lambda path: os.truncate(path, 4096), "offset 4096: .* it has 4096 bytes, and had 12288"),
        (lambda path: path.write_bytes(bytes(12289)), "it has 12289 bytes"),
        (lambda path: os.utime(path, ns=(5, 5)), "modification time 5 ns"),
    ],
)
def test_a_folder_that_changed_since_its_index(tmp_path, change, message):
    with DiskStore(tmp_path, 1 << 20, chunk=CHUNK) as store:
        store.write("a", filled(9000))
        path = store.place_of("a")[0]
    change(path)
    for _ in range(2):  # refused again: the lock was given back
        with pytest.raises(StorageError, match=rf"(?s)blob 'a' in {path}.*{message}.*remove the folder"):
            DiskStore(tmp_path, 1 << 20)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 7, "blobs": {}}', "FOREIGN", "SUMS"])
def test_an_index_that_cannot_be_read(tmp_path, text):
    with DiskStore(tmp_path, 1 << 20) as store:
        store.write("a", filled(9))
    index = json.loads((tmp_path / "index.json").read_text())
    if text == "FOREIGN":
        index["blobs"]["a"]["file"] = "../secret.blob"
    if text == "SUMS":
        index["blobs"]["a"]["sums"] = []
    (tmp_path / "index.json").write_text(json.dumps(index) if text.isupper() else text)
    with pytest.raises(StorageError, match=r"index\.json (cannot be read|is of version 7)"):
        DiskStore(tmp_path, 1 << 20)
    assert list(tmp_path.glob("*.blob"))


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "I/O error")])
def test_a_thread_that_dies_surfaces_in_the_waiting_call(store, monkeypatch, error):
    store.write("a", filled(9 * CHUNK))

    def die(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", die)
        with pytest.raises(StorageError, match=r"blob 'a' in .* offset 0: ") as caught:
            read(store, "a")
        assert caught.value.__cause__ is error
        patch.setattr(os, "pwritev", die)
        with pytest.raises(StorageError, match="offset 0: "):
            store.write("b", filled(10))
    assert torch.equal(read(store, "a"), filled(9 * CHUNK))
    assert not open_blobs()


def test_reads_are_served_in_the_order_of_request(tmp_path, monkeypatch):
    with DiskStore(tmp_path, 1 << 20, threads=1, chunk=CHUNK) as store:
        store.write("a", filled(3 * CHUNK, 1))
        store.write("b", filled(3 * CHUNK, 2))
        served = []
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *call: served.append(call) or preadv(*call))
        outs = [memory(3 * CHUNK) for _ in range(4)]
        handles = [store.read_async("ab"[n % 2], outs[n]) for n in range(4)]
        for handle in handles:
            handle.wait()
            assert handle.done()
        places = [disk_files._address(buffers[0]) for _, buffers, _ in served]
        assert places == [out.data_ptr() + n * CHUNK for out in outs for n in range(3)]
        assert torch.equal(outs[3], filled(3 * CHUNK, 2))


def test_a_blob_replaced_while_it_is_read_is_read_as_it_was(store, monkeypatch):
    store.write("a", filled(2 * CHUNK, 1))
    go = threading.Event()
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *call: go.wait(60) and preadv(*call))
    out = memory(2 * CHUNK)
    handle = store.read_async("a", out)
    store.write("a", filled(2 * CHUNK, 2))
    store.delete("a")
    assert not handle.done()
    go.set()
    handle.wait()
    assert torch.equal(out, filled(2 * CHUNK, 1))


def test_closing_ends_what_is_under_way(tmp_path, monkeypatch):
    store = DiskStore(tmp_path, 1 << 20, threads=1, chunk=CHUNK)
    store.write("a", filled(5 * CHUNK))
    started, go = threading.Event(), threading.Event()

    def slow(call):
        return lambda *arguments: started.set() or (go.wait(60) and call(*arguments))

    monkeypatch.setattr(os, "preadv", slow(os.preadv))
    monkeypatch.setattr(os, "pwritev", slow(os.pwritev))
    handle = store.read_async("a", memory(5 * CHUNK))
    failures = []

    def write():
        with pytest.raises(StorageError, match="closed") as caught:
            store.write("b", filled(5 * CHUNK))
        failures.append(caught)

    writer = threading.Thread(target=write)
    writer.start()
    started.wait(60)
    while not store._writes:
        time.sleep(0.001)
    threading.Timer(0.1, go.set).start()
    store.close()
    writer.join(60)
    assert len(failures) == 1
    with pytest.raises(StorageError, match="the store was closed before this was done"):
        handle.wait()
    for call in (store.flush, lambda: store.read("a", memory(5 * CHUNK)), lambda: store.write("c", filled(1))):
        with pytest.raises(StorageError, match="is closed"):
            call()
    assert not threads()
    monkeypatch.undo()
    with DiskStore(tmp_path, 1 << 20) as again:
        assert list(again) == ["a"]
        assert len(files(again)) == 1
        again.verify()


def test_a_pool_that_starts_no_thread(store, monkeypatch):
    store.write("a", filled(2 * CHUNK))
    store._readers.shutdown()
    with pytest.raises(StorageError, match=r"blob 'a' .* not served: .*shutdown"):
        read(store, "a")
    assert not open_blobs()


def test_an_interrupted_write_waits_for_its_threads(store, monkeypatch):
    store.write("a", filled(10, 1))
    pwritev = os.pwritev
    wait = threading.Event.wait
    main = threading.current_thread()
    interrupted = []

    def interrupt(event, timeout=None):
        if threading.current_thread() is main and not interrupted:
            interrupted.append(event)
            raise KeyboardInterrupt
        return wait(event, timeout)

    monkeypatch.setattr(os, "pwritev", lambda *call: time.sleep(0.05) or pwritev(*call))
    store.write("warm", filled(3 * CHUNK))  # threads start before their waits are replaced
    monkeypatch.setattr(threading.Event, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write("a", filled(9 * CHUNK))
    assert torch.equal(read(store, "a"), filled(10, 1))
    assert len(files(store)) == 2
    assert not open_blobs()


def test_an_index_that_cannot_be_written(tmp_path, monkeypatch):
    store = DiskStore(tmp_path, 1 << 20)
    store.write("a", filled(10))
    store.flush()
    store.write("b", filled(10))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            store.flush()
        with pytest.raises(StorageError, match="No space left"):
            store.close()
    with DiskStore(tmp_path, 1 << 20) as again:  # unlocked all the same
        assert list(again) == ["a"]


def test_eight_threads(tmp_path):
    failures = []
    with DiskStore(tmp_path, 1 << 23, threads=4, chunk=CHUNK) as store:

        def hammer(number):
            choose = random.Random(number)
            held = {}
            try:
                for turn in range(60):
                    key = f"{number}-{choose.randrange(4)}"
                    kind = choose.random()
                    if key not in held or kind < 0.4:
                        held[key] = filled(choose.choice(SIZES), turn, choose.choice([0, 1]))
                        store.write(key, held[key])
                    elif kind < 0.5:
                        store.delete(key)
                        del held[key]
                    else:
                        assert torch.equal(read(store, key), held[key])
                    store.write("shared", filled(CHUNK + 3, 7))
                    assert torch.equal(read(store, "shared"), filled(CHUNK + 3, 7))
                    if choose.random() < 0.05:
                        store.flush()
                kept[number] = held
            except BaseException as error:
                failures.append(error)
                raise

        kept = {}
        workers = [threading.Thread(target=hammer, args=(number,)) for number in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures
        blobs = {key: data for held in kept.values() for key, data in held.items()}
        assert set(store) == {*blobs, "shared"}
        assert store.used == sum(path.stat().st_size for path in tmp_path.glob("*.blob"))
        assert store.peak <= store.capacity
        store.verify()
    with DiskStore(tmp_path, 1 << 23) as store:
        for key, data in blobs.items():
            assert torch.equal(read(store, key), data)
