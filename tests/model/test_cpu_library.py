"""Kernels for a CPU are compiled once, whoever asks; where they cannot be, PyTorch's operations do the work."""

import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.ops import cpu

SOURCE = '#include "vector.h"\nextern "C" int64_t lanes() { return LANES; }\n'
EXPONENTIALS = """
#include "vector.h"
extern "C" void exponentials(int64_t n, const float* x, float* y) {
    for (int64_t i = 0; i < n; i += LANES) store(y + i, exp(load(x + i)));
}
"""
PRODUCTS = """
#include "gemm.h"
extern "C" void product(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc
) {
    multiply(m, n, k, a, row, step, b, n, c, ldc, true);
}
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of C++ files beside the project's headers, and an empty cache."""
    folder = tmp_path / "sources"
    shutil.copytree(cpu.HERE, folder)
    monkeypatch.setattr(cpu, "HERE", folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for cached in (cpu.library, cpu._cache, cpu._compiler):
        cached.cache_clear()
    yield folder
    for cached in (cpu.library, cpu._cache, cpu._compiler):
        cached.cache_clear()


def compiled(folder: Path, name: str, source: str) -> ctypes.CDLL:
    (folder / f"{name}.cpp").write_text(source)
    made = cpu.library(name)
    if made is None:
        pytest.skip("no C++ compiler")
    return made


def test_a_library_is_compiled_once_and_found_again(sources: Path, tmp_path: Path) -> None:
    assert compiled(sources, "one", SOURCE).lanes() in (4, 8, 16)
    (built,) = (tmp_path / ".cache" / "rorqual").glob("one-*.so")
    written = built.stat().st_mtime_ns
    cpu.library.cache_clear()
    assert cpu.library("one") is not None and built.stat().st_mtime_ns == written


def test_another_source_is_another_library(sources: Path, tmp_path: Path) -> None:
    compiled(sources, "one", SOURCE)
    cpu.library.cache_clear()
    assert compiled(sources, "one", SOURCE.replace("return LANES", "return 7")).lanes() == 7
    assert len(list((tmp_path / ".cache" / "rorqual").glob("one-*.so"))) == 2


def test_what_does_not_compile_is_said_with_the_compilers_words(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sources / "broken.cpp").write_text("this is no C++\n")
    assert cpu.library("broken") is None
    assert "broken.cpp" in caplog.text or "no C++ compiler" in caplog.text
    assert not list((tmp_path / ".cache" / "rorqual").glob("broken*"))


def test_without_a_compiler_there_is_no_library(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    (sources / "one.cpp").write_text(SOURCE)
    assert cpu.library("one") is None and "no C++ compiler" in caplog.text


def test_a_cache_that_cannot_be_written_is_replaced(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert compiled(sources, "one", SOURCE).lanes()
    folder = cpu._cache()
    assert folder is not None and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_a_home_the_folder_is_a_temporary_one(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run under a number that no password file knows."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert compiled(sources, "one", SOURCE).lanes()
    folder = cpu._cache()
    assert folder is not None and folder.parent == Path(tempfile.gettempdir())
    cpu._remove(folder, 0)
    assert folder.exists(), "another process's"
    cpu._remove(folder, os.getpid())
    assert not folder.exists()


def test_without_any_folder_there_is_no_library(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**_: str) -> str:
        raise OSError("No space left on device")

    monkeypatch.setenv("HOME", str(tmp_path / "sources" / "gemm.h"))
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    (sources / "one.cpp").write_text(SOURCE)
    assert cpu.library("one") is None
    assert cpu._compiler() is None or ("no folder to compile into" in caplog.text and "No space left" in caplog.text)


def test_the_folder_is_for_this_user_alone(sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / ".cache" / "rorqual"
    assert cpu._cache() == home and stat.S_IMODE(home.stat().st_mode) == 0o700
    home.chmod(0o720)
    cpu._cache.cache_clear()
    assert cpu._cache() != home and "others may write to it" in caplog.text


def test_a_folder_of_another_user_is_not_used(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.os, "getuid", lambda: os.geteuid() + 1)
    assert cpu._cache() != tmp_path / ".cache" / "rorqual"


def test_a_compiler_that_does_not_run_is_none(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in cpu.COMPILERS:
        (tmp_path / name).write_bytes(b"no program")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    (sources / "one.cpp").write_text(SOURCE)
    assert cpu.library("one") is None and "no C++ compiler" in caplog.text


@pytest.mark.parametrize("kept", [0, 9, 5000])
def test_a_library_that_was_cut_is_compiled_again(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: int
) -> None:
    compiled(sources, "one", SOURCE)
    (built,) = (tmp_path / ".cache" / "rorqual").glob("one-*")
    whole = built.read_bytes()
    built.unlink()  # this process has it mapped
    built.write_bytes(whole[:kept])
    cpu.library.cache_clear()
    assert compiled(sources, "one", SOURCE).lanes() and not caplog.text
    assert len(built.read_bytes()) == len(whole)


def test_what_compiles_and_does_not_load_is_said_with_the_loaders_words(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the OpenMP library that it was linked to is missing."""
    runs, run = [], cpu.subprocess.run

    def counted(command: list[str], **options: object) -> object:
        runs.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(cpu.subprocess, "run", counted)
    (sources / "lost.cpp").write_text('extern "C" int nowhere();\nint (*pointer)() = nowhere;\n')
    if cpu._compiler() is None:
        pytest.skip("no C++ compiler")
    assert cpu.library("lost") is None
    assert "does not load" in caplog.text and "nowhere" in caplog.text and "did not compile" not in caplog.text
    assert len([command for command in runs if "-shared" in command]) == 1


def test_the_exponential_is_right_to_two_units_in_the_last_place(sources: Path) -> None:
    edges = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, -87.4, -1e30, 1e30]
    x = torch.cat([torch.linspace(-87, 88, 2**16), torch.tensor(edges * 2)])
    y = torch.empty_like(x)
    library = compiled(sources, "exponentials", EXPONENTIALS)
    library.exponentials(ctypes.c_int64(x.numel()), cpu.address(x), cpu.address(y))
    body, exact = y[: 2**16].double(), x[: 2**16].double().exp()
    assert ((body - exact) / exact).abs().max() < 2 * 2**-23
    expected = torch.tensor([torch.inf, 0, torch.nan, 1, 1, 0, 0, torch.inf] * 2)
    assert torch.equal(y[2**16 :].nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (13, 37, 50), (12, 32, 8), (25, 65, 7), (24, 64, 130)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_any_size_add_up_and_write_nothing_else(
    sources: Path, m: int, n: int, k: int, transposed: bool
) -> None:
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n + 3)
    expected = torch.cat([c[:, :n].double() + a.double() @ b.double(), c[:, n:].double()], dim=1)
    stored = a.T.contiguous().T if transposed else a
    sizes = [ctypes.c_int64(i) for i in (m, n, k)]
    strides = [ctypes.c_int64(i) for i in stored.stride()]
    compiled(sources, "products", PRODUCTS).product(
        *sizes, cpu.address(stored), *strides, cpu.address(b), cpu.address(c), ctypes.c_int64(n + 3)
    )
    torch.testing.assert_close(c.double(), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(c[:, n:].double(), expected[:, n:])
