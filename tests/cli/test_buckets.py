"""The rules of buckets: defaults, chunks, missing halves, duplicates, and buckets that nothing reaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend_rngd.artifact import open_artifact
from ir.errors import Problem
from rngdc.buckets import BucketRequest, BucketSpec, choose, chunks
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_build_problems import refused


def chosen(
    request: BucketRequest, kind: str = "decoder", positions: int | None = 131072
) -> tuple[list[BucketSpec], list[Problem], list[str]]:
    problems: list[Problem] = []
    notes: list[str] = []
    return choose(request, kind, positions, problems, notes), problems, notes


def names(request: BucketRequest, kind: str = "decoder", positions: int | None = 131072) -> list[str]:
    """The programs of a request that has no problem."""
    found, problems, _ = chosen(request, kind, positions)
    assert not problems
    return [b.name for b in found]


def test_no_bucket_means_one_of_each_at_the_maximum() -> None:
    assert names(BucketRequest([], [])) == ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"]
    assert names(BucketRequest([], []), positions=512) == ["prefill_b1_s512_kv512", "decode_b1_kv512"]
    assert names(BucketRequest([], [], 4096)) == ["prefill_b1_s4096_kv4096", "decode_b1_kv4096"]
    assert names(BucketRequest([], []), "encoder", 512) == ["encode_b1_s512"]


def test_buckets_of_the_specification() -> None:
    found = names(BucketRequest([(1, 512), (1, 1024)], [(4, 1024), (4, 2048)]))
    assert found == ["prefill_b1_s512_kv512", "prefill_b1_s1024_kv1024", "decode_b4_kv1024", "decode_b4_kv2048"]


def test_chunked_prefill_of_the_specification() -> None:
    """EXAONE: chunks of 8,192 in 32,768 tokens make eight programs."""
    found = names(BucketRequest([], [(4, 32768)], 32768, 8192), positions=32768)
    assert found == [
        "prefill_b1_s8192_kv8192",
        "prefill_b1_s8192_kv8192_nologits",
        "chunk_b1_s8192_kv16384",
        "chunk_b1_s8192_kv16384_nologits",
        "chunk_b1_s8192_kv24576",
        "chunk_b1_s8192_kv24576_nologits",
        "chunk_b1_s8192_kv32768",
        "decode_b4_kv32768",
    ]


def test_a_prompt_that_is_no_multiple_of_the_chunk() -> None:
    found = chunks(2048, 5000)
    assert [(b.input_length, b.attention_size, b.logits) for b in found] == [
        (2048, 2048, True), (2048, 2048, False), (2048, 4096, True), (2048, 4096, False), (904, 5000, True),
    ]  # fmt: skip


def test_chunks_replace_the_default_prefill() -> None:
    assert names(BucketRequest([], [], None, 1024)) == [
        "prefill_b1_s1024_kv1024", "prefill_b1_s1024_kv1024_nologits", "chunk_b1_s1024_kv2048", "decode_b1_kv2048",
    ]  # fmt: skip
    assert names(BucketRequest([], [], 1024, 1024)) == ["prefill_b1_s1024_kv1024", "decode_b1_kv1024"]


def test_prefill_buckets_beside_chunks() -> None:
    found, problems, notes = chosen(BucketRequest([(1, 128), (1, 256), (1, 512)], [(1, 512)], None, 256))
    assert not problems
    assert [b.name for b in found if b.phase == "prefill"] == [
        "prefill_b1_s128_kv128", "prefill_b1_s256_kv256", "prefill_b1_s256_kv256_nologits",
    ]  # fmt: skip
    assert any("-pb 1,512 is left out" in n for n in notes)
    assert any("duplicate" in n for n in notes)


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        (BucketRequest([(1, 8)], []), "decoder", "without a decode bucket"),
        (BucketRequest([], [(1, 8)]), "decoder", "without a prefill bucket"),
        (BucketRequest([(1, 64)], [(1, 32)]), "decoder", "-pb 1,64 is longer than every decode bucket"),
        (BucketRequest([(1, 1)], [(1, 1)]), "decoder", "-db 1,1 is too short"),
        (BucketRequest([(1, 200)], [(1, 200)]), "decoder", "-pb 1,200 is too long"),
        (BucketRequest([], [], 200), "decoder", "--max-seq-len-to-capture 200"),
        (BucketRequest([], [], 0), "decoder", "--max-seq-len-to-capture 0"),
        (BucketRequest([(1, 32)], [(1, 64)], 100), "decoder", "no bucket holds --max-seq-len-to-capture 100"),
        (BucketRequest([(1, 32)], [], 100), "encoder", "no bucket holds --max-seq-len-to-capture 100"),
        (BucketRequest([], [(1, 64)], None, 65), "decoder", "--prefill-chunk-size 65"),
        (BucketRequest([], [(1, 64)], None, 0), "decoder", "--prefill-chunk-size 0"),
        (BucketRequest([(1, 64)], [], None, 16), "encoder", "--prefill-chunk-size 16"),
        (BucketRequest([], [(1, 64)], 128, 16), "decoder", "no bucket holds --max-seq-len-to-capture 128"),
    ],
)
def test_problems(request_: BucketRequest, kind: str, text: str) -> None:
    _, problems, _ = chosen(request_, kind, 128)
    assert any(text in p.what for p in problems), problems
    assert all(p.why and p.fix for p in problems)


def test_buckets_that_nothing_reaches_are_left_out() -> None:
    found, problems, notes = chosen(BucketRequest([(1, 64)], [(1, 64), (1, 128), (4, 128)], 64))
    assert not problems
    assert [b.name for b in found] == ["prefill_b1_s64_kv64", "decode_b1_kv64", "decode_b4_kv128"]
    assert [n for n in notes if "-db 1,128 is left out" in n]


def test_the_command_builds_the_sizes_that_were_asked_for(
    rngdc: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("sizes")
    model = write_model(base / "m", weights=False)
    arguments = ("--weights", "none", "--dry-run", "--json", "-")
    buckets = rngdc("build", model, "--max-seq-len-to-capture", "48", *arguments).json["buckets"]
    assert [b["name"] for b in buckets] == ["prefill_b1_s48_kv48", "decode_b1_kv48"]
    ran = rngdc("build", model, "--prefill-chunk-size", "16", "-db", "2,40", *arguments)
    assert [b["name"] for b in ran.json["buckets"]] == [
        "prefill_b1_s16_kv16", "prefill_b1_s16_kv16_nologits", "chunk_b1_s16_kv32", "chunk_b1_s16_kv32_nologits",
        "chunk_b1_s8_kv40", "decode_b2_kv40",
    ]  # fmt: skip
    refused(rngdc("build", model, "--max-seq-len-to-capture", "65", *arguments), "--max-seq-len-to-capture 65")


def test_prompts_are_read_in_chunks(rngdc: Command, model: Path, tmp_path: Path) -> None:
    """The tokens are those of a build that reads prompts at once; every level of every program agrees."""
    chunked, whole = tmp_path / "chunked", tmp_path / "whole"
    assert rngdc("build", model, chunked, "-tp", "1", "--prefill-chunk-size", "16", "-db", "1,46").status == 0
    assert rngdc("build", model, whole, "-tp", "1", "-pb", "1,46", "-db", "1,46").status == 0
    assert [b.name for b in open_artifact(chunked).buckets if not b.outputs] == [
        "prefill_b1_s16_kv16_nologits", "chunk_b1_s16_kv32_nologits",
    ]  # fmt: skip
    times: list[float] = []
    for length in (5, 16, 17, 32, 33, 40, 43):
        ids = ",".join(str(3 + 7 * i % 120) for i in range(length))
        arguments = ("--prompt-ids", ids, "--max-tokens", "4", "--ignore-eos", "--json", "-")
        ours, theirs = rngdc("run", chunked, *arguments), rngdc("run", whole, *arguments)
        assert ours.status == 0, ours.err
        assert ours.json["token_ids"] == theirs.json["token_ids"]
        times.append(ours.json["ttft_us"])
    assert times[0] == times[1] < min(times[2:4]) <= max(times[2:4]) < times[4]  # one chunk, two, three
    refused(rngdc("run", chunked, "--prompt-ids", ",".join(["5"] * 47)), "has 47 tokens", "holds 46")
    ran = rngdc("check", chunked)
    assert ran.status == 0, ran.out
