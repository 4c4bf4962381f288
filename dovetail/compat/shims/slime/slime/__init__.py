"""What `import slime` finds where nothing else of that name is on the path."""

from dovetail.compat.finder import stand_in

stand_in(__name__)
