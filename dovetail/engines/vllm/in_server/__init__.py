"""What runs inside a vLLM server. This folder stands on the server's PYTHONPATH, so its modules are
imported there by their bare names; the run itself imports none of them, only these names."""

BACKEND = "dovetail_snapshot"
"""For `--weight-transfer-config`."""
EXTENSION = "dovetail_vllm_receiver.SnapshotExtension"
"""For `--worker-extension-cls`."""
