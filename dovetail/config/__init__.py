"""Every knob, declared once: sections, the tree, and the ways values come in."""
