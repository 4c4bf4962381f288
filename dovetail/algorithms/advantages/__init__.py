"""One file per advantage estimator; `dovetail.algorithms.table` names them."""
