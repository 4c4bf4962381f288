"""One file per loss; `dovetail.algorithms.table` names them."""
