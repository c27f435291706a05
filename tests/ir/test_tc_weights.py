from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ir.errors import UserError
from ir.weights import WeightRef, WeightTable, safetensors_refs, write_safetensors

rng = np.random.default_rng(5)
ARRAYS = {
    "a": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
    "b": rng.standard_normal(7).astype(np.float32),
    "c": np.arange(6, dtype=np.int64).reshape(2, 3),
    "d": np.array([True, False]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, ARRAYS)
    return path


def test_ranges_read_what_was_written(file: Path) -> None:
    table = WeightTable({ref.name: ref for ref in safetensors_refs(file)})
    assert sorted(table) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert table.load(name).dtype == array.dtype
        assert np.array_equal(table.load(name), array)


def test_the_format_is_the_public_one(file: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    assert np.array_equal(library.load_file(file)["b"], ARRAYS["b"])
    library.save_file({"x": ARRAYS["b"]}, tmp_path / "other.safetensors")
    (ref,) = safetensors_refs(tmp_path / "other.safetensors")
    assert np.array_equal(WeightTable({"x": ref}).load("x"), ARRAYS["b"])


def test_a_tensor_name_is_enough_and_files_may_be_relative(file: Path) -> None:
    table = WeightTable(base=file.parent)
    table.add(WeightRef("model.a", (3, 5), "bf16", file=file.name, tensor="a"))
    assert np.array_equal(table.load("model.a"), ARRAYS["a"])


def test_json_keeps_every_source(file: Path, tmp_path: Path) -> None:
    table = WeightTable({ref.name: ref for ref in safetensors_refs(file)})
    table.add(WeightRef("small", (2,), "f32", inline=np.array([1, 2], np.float32)))
    table.add(WeightRef("large", (200, 100), "f32", inline=rng.standard_normal((200, 100)).astype(np.float32)))
    table.add(WeightRef("layers.0.input_layernorm.weight", (4,), "bf16", seed=3))
    table.add(WeightRef("nothing", (4,), "bf16"))
    with pytest.raises(ValueError, match="need a directory: large"):
        table.to_json()
    text = json.dumps(table.to_json(tmp_path))
    again = WeightTable.from_json(json.loads(text), tmp_path)
    assert list(again) == list(table)
    for name in table:
        if name != "nothing":
            assert np.array_equal(again.load(name), table.load(name)), name


def test_random_weights_depend_on_seed_and_name_only() -> None:
    def load(name: str, seed: int) -> np.ndarray:
        return WeightTable({name: WeightRef(name, (64, 32), "f32", seed=seed)}).load(name)

    assert np.array_equal(load("w", 1), load("w", 1))
    assert not np.array_equal(load("w", 1), load("w", 2))
    assert not np.array_equal(load("w", 1), load("v", 1))
    assert load("w", 1).std() == pytest.approx(0.02, rel=0.1)


def test_unreadable_weights_say_what_to_do(file: Path, tmp_path: Path) -> None:
    table = WeightTable()
    with pytest.raises(UserError, match="weight x: the table does not have it"):
        table.load("x")
    table.add(WeightRef("x", (4,), "f32"))
    with pytest.raises(UserError, match="--weights link"):
        table.load("x")
    table.add(WeightRef("x", (4,), "f32", file=str(tmp_path / "gone"), offset=0, nbytes=16))
    with pytest.raises(UserError, match=r"restore .*gone"):
        table.load("x")
    table.add(WeightRef("x", (9, 9), "bf16", file=str(file), tensor="a"))
    with pytest.raises(UserError, match="30 bytes are stored"):
        table.load("x")
    table.add(WeightRef("x", (3, 5), "bf16", file=str(file), tensor="z"))
    with pytest.raises(UserError, match="has no z"):
        table.load("x")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut is cut off"):
        safetensors_refs(tmp_path / "cut")
    (tmp_path / "junk").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="junk cannot be read"):
        safetensors_refs(tmp_path / "junk")
    with pytest.raises(UserError, match="element type F8_E4M3 is not read"):
        WeightRef("x", (4,), "F8_E4M3")
