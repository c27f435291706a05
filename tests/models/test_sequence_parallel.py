"""Prompts whose tokens the units of a group share between collectives, in chunks: what users get without an option."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend_rngd.isa.descriptors import Dma, Exec, Space, SwitchKind
from passes import chunk_sizes
from rngdc.buckets import BucketRequest
from rngdc.check import check
from tests.frontend.tiny import save_model
from tests.models.parallel import built, loaded


@pytest.mark.parametrize(("case", "tensor", "tokens"), [("llama", 2, 256), ("qwen3", 4, 256)])
def test_chunks_of_shared_tokens(
    case: str, tensor: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation of every unit computes what its `tc` operation says, and layers exchange in data memory only."""
    save_model(case, tmp_path / "model", torch.bfloat16, hidden_size=64, max_position_embeddings=tokens)
    monkeypatch.setattr(chunk_sizes, "VALUE_BYTES", 64 * tensor * 2 * 64)  # chunks with a token for each slice
    request = BucketRequest([(1, tokens)], [(1, tokens)])
    artifact = built(tmp_path / "model", tmp_path / "out", tensor, request, opt_level=1)
    [bucket] = [b for b in artifact.buckets if b.phase == "prefill"]
    layers = [r for r in artifact.stream(bucket).routines if r.name.startswith("block_0")]
    assert layers
    for layer in layers:
        moves = [i.what for i in layer.instructions if isinstance(i.what, Dma)]
        peers = [m.source.space for m in moves if m.source.space.is_peer]
        assert len(peers) >= 4  # two reduce-scatters, two all-gathers
        assert set(peers) == {Space.PEER_DM}
        rings = [i.what.switch for i in layer.instructions if isinstance(i.what, Exec) and i.what.switch is not None]
        assert all(s.kind == SwitchKind.BROADCAST01 for s in rings)
    [found] = check(loaded(artifact, 1), [bucket]).buckets
    assert found.streams is not None
    assert found.streams.agrees, found
