"""The layer library gives what compressing gives, to the bit, whatever happens to its files."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretorch.runners.compression import library as module
from paretorch.runners.compression.library import LayerLibrary, LayerStatistics, Method, compress_layer, default_folder
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.obs import order
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify

LEVELS = [(bits, ratio) for bits in (2, 3, 8, 16, 32) for ratio in (0.0, 0.3)]


def weights(seed=0, shape=(6, 5, 3, 3), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None or isinstance(theirs, int):
            assert mine == theirs
        else:
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(mine, theirs)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def counted(monkeypatch):
    """How often a layer was really compressed."""
    calls = []

    def compress(weight, bits, ratio, *more):
        calls.append((bits, ratio))
        return compress_layer(weight, bits, ratio, *more)

    monkeypatch.setattr(module, "compress_layer", compress)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (1, 7), (4, 2, 5)])
def test_it_gives_what_compressing_gives(tmp_path, shape, dtype):
    weight = weights(1, shape, dtype)
    for _ in range(2):  # written, then read by another library
        library = LayerLibrary(tmp_path)
        for bits, ratio in LEVELS:
            same(library.compress_layer(weight, bits, ratio), compress_layer(weight, bits, ratio))
            same(library.compress_layer(weight, bits, ratio), compress_layer(weight, bits, ratio))
    turned = weights(2, (5, 6, 3, 3)).transpose(0, 1)  # not contiguous
    same(LayerLibrary(tmp_path).compress_layer(turned, 4, 0.5), compress_layer(turned, 4, 0.5))


def test_each_level_is_compressed_once_for_all_libraries(tmp_path, counted):
    weight = weights()
    for _ in range(3):
        library = LayerLibrary(tmp_path)
        for bits, ratio in LEVELS * 2:
            library.compress_layer(weight, bits, ratio)
    # 16 and 32 bits have no scale: with zeros they are one level, without there is nothing to compress.
    assert sorted(counted) == sorted({(min(b, 32) if b <= 8 else 32, r) for b, r in LEVELS} - {(32, 0.0)})
    library.compress_layer(weight + 1e-6, 8, 0.0)
    library.compress_layer(weight.view(6, 45), 8, 0.0)
    assert len(counted) == 9, "another weight, and the same bytes in another shape, are other layers"


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_one_sweep_serves_all_levels(tmp_path, monkeypatch, limit):
    """On disk, or in memory where there is none; of another pattern, weight or Hessian it is another sweep."""
    sweeps = []
    monkeypatch.setattr(module, "order", lambda *about: sweeps.append(about) or order(*about))
    weight, x = weights(shape=(6, 8)), torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    layer_statistics = LayerStatistics("inputs", 0, lambda: (x @ x.T)[None], lambda: pytest.fail("nobody asked"))
    library = LayerLibrary(tmp_path, limit=limit)
    for bits in (4, 32):
        for ratio in (0.3, 0.5, 0.9):
            found = library.compress_layer(weight, bits, ratio, Method("obs"), layer_statistics)
            same(found, compress_layer(weight, bits, ratio, Method("obs"), layer_statistics))
    assert len(sweeps) == 1
    LayerLibrary(tmp_path, limit=limit).compress_layer(weight, 8, 0.5, Method("obs"), layer_statistics)
    assert len(sweeps) == (1 if limit else 2)
    before = len(sweeps)
    library.compress_layer(weight, 32, 0.5, Method("obs", "2:4"), layer_statistics)
    library.compress_layer(weight + 1, 32, 0.5, Method("obs"), layer_statistics)
    library.compress_layer(weight, 32, 0.5, Method("obs"), replace(layer_statistics, key="other inputs"))
    assert len(sweeps) == before + 3


def test_what_is_given_away_is_never_given_again(tmp_path):
    library, weight = LayerLibrary(tmp_path), weights()
    mask, scale, *_ = library.compress_layer(weight, 4, 0.5)
    mask.zero_(), scale.zero_()
    same(library.compress_layer(weight, 4, 0.5), compress_layer(weight, 4, 0.5))


def test_affine_grids_are_kept_by_the_factors_that_they_are_laid_over(tmp_path, counted):
    weight, layer_statistics = (
        weights(shape=(6, 8)),
        LayerStatistics("inputs", 0, lambda: torch.eye(8)[None], lambda: pytest.fail("nobody asked")),
    )
    factors = [None, torch.full((6,), 2.0), torch.linspace(-3, 3, 6)]
    methods = [
        Method(scheme="affine"),
        Method(scheme="affine", ranges="minmax"),
        Method(scheme="affine", rounding="gptq"),
    ]
    for _ in range(2):
        library = LayerLibrary(tmp_path)
        for factor in factors:
            for method in methods:
                expected = compress_layer(weight, 4, 0.5, method, layer_statistics, factor=factor)
                same(library.compress_layer(weight, 4, 0.5, method, layer_statistics, factor), expected)
                assert expected.scale.shape == (1,)
                assert 0 <= expected.zero < 16
    assert len(counted) == len(factors) * len(methods)
    same(
        library.compress_layer(weight, 4, 0.5, factor=factors[1]), library.compress_layer(weight, 4, 0.5)
    )  # without effect, and one entry
    assert len(counted) == len(factors) * len(methods) + 1


def test_the_version_counts(tmp_path, counted, monkeypatch):
    LayerLibrary(tmp_path).compress_layer(weights(), 4, 0.5)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    LayerLibrary(tmp_path).compress_layer(weights(), 4, 0.5)
    assert len(counted) == 2


def test_who_changes_the_algorithm_must_raise_the_version():
    """Numbers that every platform computes alike. When this fails on purpose, raise `library.VERSION`, then mend it."""
    weight = torch.tensor([[8.0, -4.0, 2.0, 1.0], [1.0, 1.0, 1.0, -64.0]])
    mask, scale, *_ = compress_layer(weight, 3, 0.25)
    assert mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    torch.testing.assert_close(scale, torch.tensor([2.4177778, 64 / 3]), rtol=1e-6, atol=0)
    assert module.VERSION == 2


@pytest.mark.parametrize("damage", ["torn", "empty", "noise", "bit", "foreign", "other", "pickle", "folder"])
def test_a_damaged_file_is_computed_and_written_anew(tmp_path, damage, counted):
    weight = weights()
    expected = compress_layer(weight, 4, 0.5)
    LayerLibrary(tmp_path).compress_layer(weight, 4, 0.5)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    if damage == "torn":
        path.write_bytes(whole[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "noise":
        path.write_bytes(b"\xff" * 400)
    elif damage == "bit":  # of a scale: the file is a fine safetensors file
        stored = load_file(path)
        stored["scale"][0] *= 1.01
        save_file(stored, path)
    elif damage == "foreign":
        save_file({"mask": torch.zeros(3), "scale": torch.ones(2)}, path)
    elif damage == "other":  # the entry of another weight under this name
        LayerLibrary(tmp_path / "b").compress_layer(weights(5), 4, 0.5)
        path.write_bytes(files(tmp_path / "b")[0].read_bytes())
    elif damage == "pickle":
        torch.save({"mask": torch.zeros(3)}, path)
    else:
        path.unlink()
        path.mkdir()
    same(LayerLibrary(tmp_path).compress_layer(weight, 4, 0.5), expected)
    assert len(counted) == (3 if damage == "other" else 2)
    assert path.is_dir() if damage == "folder" else path.read_bytes() == whole


def test_the_least_recently_used_go(tmp_path):
    one = 4096
    library = LayerLibrary(tmp_path, limit=16 * one, memory=0)
    for seed in range(60):
        library.compress_layer(weights(seed), 4, 0.5)
        if seed >= 10:
            library.compress_layer(weights(3), 4, 0.5)  # which is used all the time
        for age, path in enumerate(sorted(files(tmp_path), key=lambda p: p.stat().st_mtime)):
            os.utime(path, (1000 + age, 1000 + age))  # a clock that is fine enough
        assert len(files(tmp_path)) <= 16
    left = {path.name for path in files(tmp_path)}
    wanted = {f"{module._key(weights(seed), 4, 0.5)}.safetensors" for seed in (3, 57, 58, 59)}
    assert wanted <= left
    assert len(left) >= 12


def test_a_file_that_vanishes_while_others_read_is_computed(tmp_path, monkeypatch):
    library = LayerLibrary(tmp_path, memory=0)
    weight = weights()
    library.compress_layer(weight, 4, 0.5)
    utime = os.utime

    def late(path):
        path.unlink()
        utime(path)

    monkeypatch.setattr(module.os, "utime", late)
    for _ in range(2):  # it goes after it was read, then it is not there
        same(library.compress_layer(weight, 4, 0.5), compress_layer(weight, 4, 0.5))


def test_a_folder_that_vanishes_is_made_again(tmp_path, monkeypatch):
    library = LayerLibrary(tmp_path / "cache", memory=0)
    library.compress_layer(weights(), 4, 0.5)
    entries = files(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    same(library.compress_layer(weights(), 4, 0.5), compress_layer(weights(), 4, 0.5))
    assert files(tmp_path) == entries

    def listing(*arguments):
        yield from [*entries, tmp_path / "gone.safetensors"]
        raise FileNotFoundError

    monkeypatch.setattr(module.Path, "glob", listing)
    library.limit = 0
    library._prune()
    assert not any(path.exists() for path in entries)


def test_memory_is_bounded(tmp_path, counted):
    library = LayerLibrary(limit=0, memory=2000)
    for seed in range(100):
        library.compress_layer(weights(seed), 4, 0.5)
    assert 0 < library._kept_bytes <= 2000
    assert library._kept_bytes == sum(module._bytes(entry) for entry in library._kept.values())
    library.compress_layer(weights(99), 4, 0.5)
    assert len(counted) == 100
    library.compress_layer(weights(0), 4, 0.5)
    assert len(counted) == 101


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, kind, counted):
    folder = tmp_path / "fixed"
    if kind == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        folder.chmod(0o555)
        if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode and os.geteuid() == 0:
            pytest.skip("root may write everywhere, and chattr does not work here")
    try:
        library = LayerLibrary(folder)
        for _ in range(3):
            same(library.compress_layer(weights(), 4, 0.5), compress_layer(weights(), 4, 0.5))
        assert len(counted) == 1, "it still lives in memory"
        assert folder.read_text() == "mine" if kind == "file" else not list(folder.iterdir())
    finally:
        if kind == "read-only":
            subprocess.run(["chattr", "-i", folder], capture_output=True, check=False)
            folder.chmod(0o755)


def test_what_a_crash_leaves_is_cleared_away(tmp_path):
    library = LayerLibrary(tmp_path)
    library.compress_layer(weights(), 4, 0.5)
    home = files(tmp_path)[0].parent
    for name, age in ((".old.partial", 1000), (".new.partial", None)):
        (home / name).touch()
        if age:
            os.utime(home / name, (age, age))
    library._prune()
    assert {path.name for path in files(tmp_path) if path.suffix == ".partial"} == {".new.partial"}


WRITER = """
import sys, torch
from pathlib import Path
from paretorch.runners.compression.library import LayerLibrary, compress_layer
torch.set_num_threads(1)
sys.stdin.readline()
for turn in range(6):
    library = LayerLibrary(Path(sys.argv[1]), limit=40 * 4096, memory=0)
    for seed in range(40):
        weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed))
        for mine, theirs in zip(library.compress_layer(weight, 2, 0.5)[:2], compress_layer(weight, 2, 0.5)[:2]):
            assert torch.equal(mine, theirs), seed
"""


def test_two_processes_write_at_once(tmp_path):
    """The same entries in a folder too small for all of them, so that each prunes what the other reads."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=200)
        assert writer.returncode == 0, errors
    left = files(tmp_path)
    assert {path.suffix for path in left} == {".safetensors"}
    assert 20 <= len(left) <= 42


def test_threads_share_one(tmp_path):
    library, wrong = LayerLibrary(tmp_path, memory=3000), []

    def work():
        for seed in (*range(12), *range(12)):
            found = library.compress_layer(weights(seed), 3, 0.5)
            if not torch.equal(found[1], compress_layer(weights(seed), 3, 0.5)[1]):
                wrong.append(seed)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert library._kept_bytes == sum(module._bytes(entry) for entry in library._kept.values())


def test_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETORCH_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.delenv("PARETORCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "paretorch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "paretorch"
    LayerLibrary().compress_layer(weights(), 4, 0.5)
    assert len(files(tmp_path / "home")) == 1
    monkeypatch.setattr(module.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert default_folder() is None
    same(LayerLibrary().compress_layer(weights(), 4, 0.5), compress_layer(weights(), 4, 0.5))


RECIPES = {
    "mixed": Recipe((Sparsify("fc", 0.5), Quantize("stem", 8, 8), Quantize("down", 3), Quantize("fc", 16))),
    "pruned": Recipe((Prune("down", 16), Sparsify("down", 0.3), Quantize("down", 2), Recover("batchnorm"))),
    "trained": Recipe((Sparsify("stem", 0.5), Quantize("stem", 4), Recover("finetune", 0.5, 0.01))),
}


@pytest.mark.parametrize("name", RECIPES)
def test_builds_are_the_same_with_it_and_without(name, network, task_of, tmp_path, counted):
    model, x = network("residual")
    library = LayerLibrary(tmp_path / "library")
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64), library=library)
    recipe = RECIPES[name]
    with_it = [runner.build(recipe), runner.build(recipe)]
    runner.library = LayerLibrary(tmp_path / "library")
    with_it.append(runner.build(recipe))
    compressed = len(counted)
    runner.library = None
    without = runner.build(recipe)
    assert compressed == len(
        {s.layer for s in recipe.steps if isinstance(s, Sparsify | Quantize)} - ({"fc"} if name != "mixed" else set())
    )
    assert with_it == [without] * 3
