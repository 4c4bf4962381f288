"""The rows of the hook table, by the stage that calls them."""
