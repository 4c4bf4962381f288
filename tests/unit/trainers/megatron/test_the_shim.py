"""What makes megatron-core run on a CPU stands for what it asks of CUDA: a new version has to be
looked through before it is pinned."""

from tests.megatron_shim import sites

SEEN = {
    "device": 78,
    "literal": 27,
    "method": 9,
    "type": 8,
    "synchronize": 12,
    "stream": 58,
    "generator": 16,
    "te_general_gemm": 6,
    "moved": 8,
}
"""Of megatron-core 0.16.1."""


def test_megatron_core_asks_cuda_where_the_patches_were_made_for():
    assert sites() == SEEN, (
        "megatron-core changed: look through what is new for torch.cuda, mend "
        "tests/megatron_shim.py and dovetail/trainers/megatron/mending.py, then change SEEN"
    )
