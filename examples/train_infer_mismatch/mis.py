"""Weights for tokens that the engine sampled under slightly other probabilities than the trainer's.

With `r = exp(train_logprob - rollout_logprob)`, a token's policy loss is weighed by its ratio
(importance sampling), and what lies too far off is taken out (rejection sampling). Settings are
keys of --custom-config-path:

    tis_mode            truncate | clip | mask
    tis_level           token | sequence | geometric
    tis_lower_bound     default: 1 / tis_upper_bound
    tis_upper_bound
    use_rs              also reject
    rs_level            token | sequence | geometric
    rs_lower_bound      default: 1 / rs_upper_bound
    rs_upper_bound
    rs_veto_threshold   a response with one ratio below it is rejected; null: none is
"""

import torch

MODES = ("truncate", "clip", "mask")
LEVELS = ("token", "sequence", "geometric")
LARGEST_LOG = 20.0
"""Beyond e^20 a ratio says only that something is wrong."""


def compute_mis_weights(
    args,
    *,
    pg_loss: torch.Tensor,
    train_log_probs: list[torch.Tensor],
    rollout_log_probs: list[torch.Tensor],
    loss_masks: list[torch.Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    **kwargs,
):
    """The policy loss, weighed; the masks without rejected tokens; metrics per token."""
    settings = Settings(args)
    triples = zip(train_log_probs, rollout_log_probs, loss_masks, strict=True)
    judged = [settings.judge(train - rollout, mask) for train, rollout, mask in triples]
    weights, masks, metrics = zip(*judged, strict=True)
    flat = {f"mis_{name}": torch.cat([one[name] for one in metrics]) for name in metrics[0]}
    if not getattr(args, "use_tis", True):
        # --get-mismatch-metrics: only look.
        return pg_loss, loss_masks, flat
    return pg_loss * torch.cat(weights), list(masks), flat


class Settings:
    """The keys above, read and checked once per call."""

    def __init__(self, args) -> None:
        self.mode = _one_of(MODES, args, "tis_mode", "truncate")
        self.level = _one_of(LEVELS, args, "tis_level", "token")
        self.low, self.high = _bounds(args, "tis")
        self.use_rs = bool(getattr(args, "use_rs", False))
        self.rs_level = _one_of(LEVELS, args, "rs_level", "token")
        self.rs_low, self.rs_high = _bounds(args, "rs")
        self.veto = getattr(args, "rs_veto_threshold", None)

    def judge(self, log_ratio: torch.Tensor, mask: torch.Tensor):
        """Weights, mask and metrics of one response: [response_length] each."""
        log_ratio = log_ratio.detach()
        tokens = ratio_of("token", log_ratio, mask)
        ratio = ratio_of(self.level, log_ratio, mask)
        outside = (ratio < self.low) | (ratio > self.high)
        kept = torch.ones_like(mask, dtype=torch.bool)
        if self.mode == "truncate":
            weight = ratio.clamp(max=self.high)
        elif self.mode == "clip":
            weight = ratio.clamp(self.low, self.high)
        else:
            weight, kept = ratio, ~outside
        if self.use_rs:
            judged = ratio_of(self.rs_level, log_ratio, mask)
            kept = kept & (judged >= self.rs_low) & (judged <= self.rs_high)
            if self.veto is not None and bool(((tokens < self.veto) & (mask > 0)).any()):
                kept = torch.zeros_like(kept)
        metrics = {
            "ratio": tokens,
            "weight": weight * kept,
            "changed": (weight != ratio).float(),
            "rejected": (~kept).float(),
        }
        return weight, mask * kept.to(mask.dtype), metrics


def ratio_of(level: str, log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Per token: its own ratio, the product over the response, or their geometric mean."""
    if level != "token":
        total = (log_ratio * mask).sum()
        if level == "geometric":
            total = total / mask.sum().clamp(min=1)
        log_ratio = total.expand_as(log_ratio)
    return log_ratio.clamp(-LARGEST_LOG, LARGEST_LOG).exp()


def _bounds(args, kind: str) -> tuple[float, float]:
    high = getattr(args, f"{kind}_upper_bound", 2.0)
    low = getattr(args, f"{kind}_lower_bound", None)
    low = 1.0 / high if low is None else low
    if not 0 <= low <= high:
        raise ValueError(f"{kind}_lower_bound {low} and {kind}_upper_bound {high}: out of order")
    return low, high


def _one_of(known: tuple[str, ...], args, name: str, default: str) -> str:
    value = getattr(args, name, default)
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    return value
