"""Foreign .npz files: what is whole comes back bit for bit, what is not is refused before anything is allocated."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gemma_scope import random_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sweep.baselines.npz import npz_shapes, read_npz
from sweep.errors import BaselineError

ARRAYS = random_arrays(d_in=5, width=7, d_out=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("npz") / "params.npz"
    np.savez(path, **ARRAYS)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "params.npz"


def test_npz_comes_back_bit_for_bit(whole: Path) -> None:
    found = read_npz(whole)
    assert found.keys() == ARRAYS.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in ARRAYS.items())
    assert npz_shapes(whole) == {name: array.shape for name, array in ARRAYS.items()}


def test_npz_takes_empty_and_scalar_arrays(path: Path) -> None:
    np.savez(path, none=np.empty((0, 4), np.float32), one=np.float32(3))
    found = read_npz(path)
    assert found["none"].shape == (0, 4)
    assert found["one"] == 3


def test_npz_cut_short_is_refused_wherever_it_is_cut(whole: Path, path: Path) -> None:
    content = whole.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(BaselineError, match="not whole"):
            read_npz(path)


@given(data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_npz_with_changed_bytes_is_refused_or_gives_the_same_arrays(whole: Path, path: Path, data: st.DataObject):
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_npz(path)
    except BaselineError:
        return
    for name in found.keys() & ARRAYS.keys():
        assert found[name].tobytes() == ARRAYS[name].tobytes()


def entry(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("W_enc.npy", content)


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1 << 21, 1 << 21), (1 << 40, 1 << 40), (-1, -4), (3,), (1,) * 33, (0, 1 << 62)])
def test_npz_that_claims_other_than_it_has_is_refused(path: Path, shape: tuple[int, ...]) -> None:
    entry(path, header(shape) + b"\0" * 16)
    with pytest.raises(BaselineError, match="claims the shape"):
        read_npz(path)


def test_npz_whose_directory_claims_terabytes_is_refused(whole: Path, path: Path) -> None:
    entry(path, header((4,)) + b"\0" * 16)
    content = path.read_bytes()
    place = content.rindex(b"PK\x01\x02")
    path.write_bytes(content[: place + 20] + b"\xf0\xff\xff\xff" * 2 + content[place + 28 :])
    with pytest.raises(BaselineError, match=r"claims 4,294,967,280 bytes, but the file has"):
        read_npz(path)


def test_npz_that_is_compressed_is_refused(path: Path) -> None:
    np.savez_compressed(path, W_enc=np.zeros((1000, 1000), np.float32))
    with pytest.raises(BaselineError, match="compressed or encrypted"):
        read_npz(path)


def test_npz_in_fortran_order_is_the_same_array(path: Path) -> None:
    np.savez(path, W_enc=np.asfortranarray(ARRAYS["W_enc"]))
    assert np.array_equal(read_npz(path)["W_enc"], ARRAYS["W_enc"])
    assert read_npz(path)["W_enc"].flags.c_contiguous


@pytest.mark.parametrize("array", [np.array([{}], dtype=object), np.zeros(3), np.zeros(3, ">f4")])
def test_npz_of_other_than_float32_is_refused(path: Path, array: np.ndarray) -> None:
    np.savez(path, W_enc=array)
    with pytest.raises(BaselineError, match="arrays are float32"):
        read_npz(path)


def test_npz_with_a_header_of_code_is_refused(path: Path) -> None:
    text = b"__import__('os').system('false')".ljust(118) + b"\n"
    entry(path, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(BaselineError, match="not whole"):
        npz_shapes(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x00" * 100, b"<html>not found</html>"])
def test_npz_that_is_something_else_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BaselineError, match=rf"\({len(content):,} bytes\) is not whole"):
        npz_shapes(path)


def test_npz_that_is_a_pointer_of_git_lfs_says_so(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 302000000\n")
    with pytest.raises(BaselineError, match="git lfs pull"):
        npz_shapes(path)


def test_npz_that_is_not_there_says_so(path: Path) -> None:
    with pytest.raises(BaselineError, match="cannot be read"):
        npz_shapes(path)
