"""`utils.trace_utils` and `observability.trace_utils`: tracing of samples and groups."""

from dovetail.observe.trace import (
    TRACE_CHILDREN_KEY,
    Span,
    TraceHandle,
    bind_trace,
    export_trace,
    import_trace,
    trace_event,
    trace_function,
    trace_next_attempt,
    trace_span,
)
from dovetail.observe.trace_meta import build_sglang_meta_trace_attrs, build_vllm_meta_trace_attrs

__all__ = [
    "TRACE_CHILDREN_KEY",
    "Span",
    "TraceHandle",
    "bind_trace",
    "build_sglang_meta_trace_attrs",
    "build_vllm_meta_trace_attrs",
    "export_trace",
    "import_trace",
    "trace_event",
    "trace_function",
    "trace_next_attempt",
    "trace_span",
]
