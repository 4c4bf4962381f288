"""`utils.mask_utils`: loss masks of conversations."""

from dovetail.data.turn_mask import MultiTurnLossMaskGenerator, get_response_lengths

__all__ = ["MultiTurnLossMaskGenerator", "get_response_lengths"]
