"""Decode attention in CUDA C++: its sizes, and on a GPU what plain torch computes."""

from __future__ import annotations

import pytest
import torch

from oomproof.engine.native.attend_cuda import (
    CLUSTER_SIZES,
    HEAD_DIMS,
    MOST_GROUP,
    geometry_of,
    launch_attend,
    load_attend,
    supports,
    variant_of,
)
from oomproof.formats import DType
from oomproof.memory.native import attention_counters, attention_partials
from oomproof.units import KIB
from tests.engine.native.attend_cases import BF16, E4M3, FP16, Case, Step, same_bits

H200 = (132, 228 * KIB, (9, 0))
RTX_4090 = (128, 100 * KIB, (8, 9))
A100 = (108, 164 * KIB, (8, 0))

CASES = (
    *(
        Case(group=4, kv_heads=8, head_dim=128, positions=(tokens - 1,), kv_dtype=kv_dtype)
        for tokens in (1, 2, 255, 256, 257, 1000, 5000)
        for kv_dtype in (BF16, E4M3)
    ),
    *(
        Case(group=group, kv_heads=2, head_dim=128, positions=(999, 3, 256), dtype=FP16,
             kv_dtype=FP16)
        for group in (1, 3, 4, 5, 7, 8, 16)
    ),
    *(
        Case(group=group, kv_heads=2, head_dim=head_dim, positions=(700, -1, 12), dtype=dtype,
             kv_dtype=kv_dtype)
        for group in (4, 12)
        for head_dim in HEAD_DIMS
        for dtype, kv_dtype in ((BF16, BF16), (FP16, FP16), (BF16, E4M3), (FP16, E4M3))
    ),
    *(
        Case(group=4, kv_heads=8, head_dim=128, positions=positions, normed=True, window=window)
        for window in (0, 100, 600)
        for positions in ((5000,), (4000, 255, -1, 16, 15, 0, 1023, 1024))
    ),
    Case(group=4, kv_heads=8, head_dim=128, positions=(30000, 10, 20, 30)),
    Case(group=4, kv_heads=1, head_dim=128, positions=(100000,), kv_dtype=E4M3),
    Case(group=4, kv_heads=8, head_dim=64, positions=tuple(range(1, 2000, 50))),
)  # fmt: skip


def test_every_block_has_room_and_every_row_a_cluster() -> None:
    for multiprocessors, shared_bytes, capability in (H200, RTX_4090, A100):
        for rows in (1, 2, 3, 8, 31, 32, 100):
            for kv_heads in (1, 2, 8, 40):
                for context in (1, 256, 8192, 131_072):
                    for cluster in (None, *CLUSTER_SIZES) if capability >= (9, 0) else (None,):
                        geometry = geometry_of(
                            variant_of(DType.BFLOAT16, DType.BFLOAT16, 128, 4),
                            rows=rows,
                            kv_heads=kv_heads,
                            context=context,
                            multiprocessors=multiprocessors,
                            multiprocessor_shared_bytes=shared_bytes,
                            capability=capability,
                            cluster=cluster,
                        )
                        clusters = geometry.grid[0] // geometry.cluster
                        assert geometry.grid[0] % geometry.cluster == 0
                        assert geometry.clusters >= rows
                        # Rows get their share of `clusters` rounded up: one more each at most.
                        most = -(-context // geometry.cluster_tokens)
                        needed = geometry.clusters + (rows if rows > 1 else 0)
                        assert clusters >= min(needed, most * rows)
                        floats = clusters * kv_heads * 4 * 128 // 4 * 6
                        assert floats <= attention_partials(kv_heads, 4, 128, rows)
                        assert rows * kv_heads * geometry.cluster <= attention_counters(
                            kv_heads, rows
                        )


def test_one_short_request_is_one_cluster_and_long_ones_fill_the_gpu() -> None:
    variant = variant_of(DType.BFLOAT16, DType.BFLOAT16, 128, 4)
    multiprocessors, shared_bytes, capability = H200

    def grid(rows: int, context: int) -> tuple[tuple[int, int, int], int]:
        geometry = geometry_of(
            variant,
            rows=rows,
            kv_heads=8,
            context=context,
            multiprocessors=multiprocessors,
            multiprocessor_shared_bytes=shared_bytes,
            capability=capability,
        )
        return geometry.grid, geometry.cluster

    assert grid(1, 2048) == ((8, 8, 1), 8)
    assert grid(1, 131_072) == ((32, 8, 1), 2)
    assert grid(8, 2048) == ((40, 8, 1), 1)
    assert grid(32, 256) == ((32, 8, 1), 1)


def test_what_has_no_variant_stays_with_triton() -> None:
    bf16, fp16, e4m3 = DType.BFLOAT16, DType.FLOAT16, DType.FLOAT8_E4M3FN
    assert all(supports(bf16, bf16, head_dim, 4, (8, 0)) for head_dim in HEAD_DIMS)
    assert supports(fp16, e4m3, 128, MOST_GROUP, (9, 0))
    assert not supports(bf16, bf16, 128, MOST_GROUP + 1, (9, 0))
    assert not supports(bf16, bf16, 80, 4, (9, 0))
    assert not supports(bf16, fp16, 128, 4, (9, 0))
    assert not supports(DType.FLOAT32, DType.FLOAT32, 128, 4, (9, 0))
    assert not supports(fp16, fp16, 128, 4, (7, 5))


class Launched:
    """A step on a GPU with its kernel."""

    def __init__(self, case: Case, cluster: int | None = None) -> None:
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        self.step = Step(case, torch.device("cuda"))
        self.geometry = geometry_of(
            case.variant,
            rows=len(case.positions),
            kv_heads=case.kv_heads,
            context=case.window or case.context,
            multiprocessors=properties.multi_processor_count,
            multiprocessor_shared_bytes=properties.shared_memory_per_multiprocessor,
            capability=capability,
            cluster=cluster,
        )
        self._kernel = load_attend(case.variant, capability)
        self._params = self.step.params(self.geometry)

    def run(self) -> torch.Tensor:
        """What comes out."""
        self.step.out.fill_(torch.nan)
        launch_attend(self._kernel, self.geometry, self._params)
        return self.step.out.clone()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_attention_in_one_launch_is_the_references(case: Case) -> None:
    launched = Launched(case)
    first = launched.run()
    launched.step.check()
    for _ in range(5):
        assert same_bits(launched.run(), first)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs clusters",
)
@pytest.mark.parametrize("cluster", CLUSTER_SIZES)
@pytest.mark.parametrize("positions", [(5000,), (30000, 17, 900), (1,)])
def test_a_cluster_of_any_size_is_the_references(cluster: int, positions: tuple[int, ...]) -> None:
    launched = Launched(Case(group=4, kv_heads=8, head_dim=128, positions=positions), cluster)
    launched.run()
    launched.step.check()


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [BF16, E4M3])
def test_the_smallest_stored_values_count(kv_dtype: torch.dtype) -> None:
    # Most of e4m3's values here are below its normal ones.
    launched = Launched(
        Case(group=4, kv_heads=2, head_dim=128, positions=(600, 40), kv_dtype=kv_dtype)
    )
    step = launched.step
    for pool, there in zip(step.pools, step.pools_there, strict=True):
        pool.copy_((pool.float() * 0.005).to(kv_dtype))
        there.copy_(pool)
    launched.run()
    step.check()


@pytest.mark.gpu
def test_a_recorded_launch_runs_again_and_again() -> None:
    launched = Launched(
        Case(group=4, kv_heads=8, head_dim=128, positions=(9000, 3000, -1, 2), normed=True)
    )
    expected = launched.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            launched.run()
    for _ in range(100):
        launched.step.out.fill_(torch.nan)
        graph.replay()
        assert same_bits(launched.step.out, expected)
    launched.step.check()
